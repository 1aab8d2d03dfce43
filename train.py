"""Train, evaluate, use and compare adapters: python train.py {fit,validate,test,predict,compare,sweep,analyze,export} ..."""

from lightning_modules.commands.main import main, run

__all__ = ["main", "run"]

if __name__ == "__main__":
    run()
