"""Train, evaluate, use and compare adapters: python train.py {fit,test,predict,compare,export,chat,...} --help"""

import signal

_quiet = __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler
if _quiet:  # Ctrl-C while the libraries load, which takes seconds, ends the process without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from lightning_modules.commands.main import main, run  # noqa: E402

if _quiet:
    signal.signal(signal.SIGINT, signal.default_int_handler)

__all__ = ["main", "run"]

if __name__ == "__main__":
    run()
