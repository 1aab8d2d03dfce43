"""train.py generate, chat and evaluate: a trained adapter answers as in `test`, from its run's directory or its own."""

import io
import json
import sys
from types import SimpleNamespace

import pytest
import yaml
from support.language_models import ADAPTER, move_experts, tiny_llama
from support.tokenizers import byte_level
from transformers import AutoTokenizer, ByT5Tokenizer

import lightning_modules.tasks.causal_language_model
import train
from datamodules import CommonsenseDataModule, InstructionDataModule
from fourier_moe import LoRAConfig, inject, load_adapter, save_adapter
from lightning_modules import AdaptationModule
from lightning_modules.commands.export import _write_merged
from lightning_modules.commands.front_door import COMMANDS
from lightning_modules.commands.language.benchmark_tasks import BENCHMARKS
from lightning_modules.commands.language.evaluate import known_tasks
from lightning_modules.commands.language.trained_model import TrainedModel, load_trained, question_of
from lightning_modules.tasks import CausalLanguageModel, GenerationSettings

QUESTION = "Is 2 larger than 1?\n\nAnswer format: true/false"
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
SPEC = "lightning_modules.tasks.CausalLanguageModel"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "base"
    tiny_llama().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """A run's directory, with config.yaml and adapter/."""
    directory = tmp_path_factory.mktemp("run")
    model = CausalLanguageModel(str(base), tokenizer="bytes").build()
    inject(model, ADAPTER)
    move_experts(model)
    save_adapter(model, directory / "adapter", task={"class": "CausalLanguageModel", "pipeline_tag": "text-generation"})
    write_config(directory, str(base))
    return directory


def write_config(directory, model, scoring="generate", method="fourier_moe.FourierMoEConfig"):
    arguments = {"model": model, "tokenizer": "bytes", "scoring": scoring, "evaluation": {"max_new_tokens": 6}}
    classes = {"task": {"class_path": SPEC, "init_args": arguments}, "adapter": {"class_path": method}}
    config = {"model": classes, "data": {"init_args": {"prompt": "plain"}}}
    (directory / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")


@pytest.fixture
def command(run, tmp_path, monkeypatch):
    """`command("generate", prompt=...)`: a command with the run's adapter and short answers."""
    monkeypatch.chdir(tmp_path)

    def command(name, adapter=run, **options):
        short = {} if name == "evaluate" else {"max_new_tokens": 6}
        return COMMANDS[name](adapter=str(adapter), **short, **options)

    return command


@pytest.fixture
def with_template(monkeypatch):
    def load(*_):
        tokenizer = ByT5Tokenizer()
        tokenizer.chat_template = TEMPLATE
        return tokenizer

    monkeypatch.setattr(lightning_modules.tasks.causal_language_model, "load_fitting_tokenizer", load)


def rows_of_test(base, run, data, scoring="generate"):
    """The rows of `test`, by set."""
    task = CausalLanguageModel(str(base), tokenizer="bytes", scoring=scoring, evaluation=GenerationSettings(6))
    load_adapter(task.build().eval(), run / "adapter")
    data.setup("test")
    return {name: [row for batch in loader for row in task.predict(batch)] for name, loader in data.test_dataloader().items()}


# ---------------------------------------------------------------- generate


@pytest.fixture
def data(tmp_path):
    sets = {"train": "boolq", "test": ["boolq", "ARC-Easy"], "tokenizer": "bytes", "prompt": "plain"}
    made = CommonsenseDataModule(**sets, num_workers=0, batch_size=3, directory=str(tmp_path))
    CommonsenseDataModule(**sets, synthetic=True).write_synthetic(tmp_path)
    return made


def test_answers_are_those_of_test(command, base, run, data, tmp_path, capsys):
    rows = rows_of_test(base, run, data)["boolq"]
    answers = [row["output"] for row in rows]
    questions = tmp_path / "dataset/boolq/test.json"
    assert command("generate", prompts=str(questions), batch_size=3, output="new/answers.jsonl") == answers
    written = [json.loads(line) for line in (tmp_path / "new/answers.jsonl").read_text(encoding="utf-8").splitlines()]
    asked = [record["instruction"] for record in json.loads(questions.read_text())]
    assert written == [{"prompt": prompt, "output": answer} for prompt, answer in zip(asked, answers, strict=True)]
    capsys.readouterr()
    assert command("generate", prompt=asked[0], adapter=run / "adapter") == answers[:1]
    assert capsys.readouterr().out.strip() == answers[0]
    with pytest.raises(ValueError, match="exists; give a new file"):
        command("generate", prompt="a", output="new/answers.jsonl")


def test_files_of_prompts(command, main, run, tmp_path, capsys):
    (tmp_path / "lines.txt").write_text("-1 or 1?\n\nred?\n", encoding="utf-8")
    (tmp_path / "items.jsonl").write_text('{"prompt": "-1 or 1?"}\n"red?"\n', encoding="utf-8")
    lines, items = (command("generate", prompts=str(tmp_path / name)) for name in ("lines.txt", "items.jsonl"))
    assert lines == items
    assert [json.loads(line)["prompt"] for line in capsys.readouterr().out.splitlines()] == ["-1 or 1?", "red?"] * 2
    assert train.main(["generate", "--adapter", str(run), "--max-new-tokens", "12", "--prompt", "-1 or 1?"]) == lines[:1]


def test_drawing_base_model_and_prompt_are_chosen(command):
    greedy = command("generate", prompt=QUESTION)
    drawn = [command("generate", prompt=QUESTION, temperature=5.0, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert command("generate", prompt=QUESTION, temperature=5.0, top_p=1e-6) == greedy
    assert command("generate", prompt=QUESTION, without_adapter=True) != greedy
    assert command("generate", prompt=f"Question: {QUESTION}\nAnswer:", style="none") == greedy
    assert command("generate", prompt=QUESTION, style="llm_adapters") != greedy
    assert len(command("generate", prompt=QUESTION, dtype="bfloat16")) == 1


def test_base_model_that_has_moved_and_an_adapter_alone(command, base, run, tmp_path, with_template, monkeypatch):
    greedy = command("generate", prompt=QUESTION)
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("adapter.safetensors", "adapter.json"):
        (alone / name).write_bytes((run / "adapter" / name).read_bytes())
    with pytest.raises(ValueError, match=r"has no run's config.yaml; give its base model \(base\): --model DIR"):
        command("generate", prompt="a", adapter=alone)
    assert command("generate", prompt=QUESTION, model=str(base), style="plain", adapter=alone) == greedy
    templated = command("generate", prompt=QUESTION, model=str(base), adapter=alone)
    assert templated == command("generate", prompt=f"<user>{QUESTION}<a>", style="none") != greedy
    write_config(alone, "/nowhere/base", method="own_method.Config")
    (tmp_path / "own_method.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"model='/nowhere/base' has no config.json.*; --model DIR tells"):
        command("generate", prompt="a", adapter=alone)
    assert command("generate", prompt=QUESTION, model=str(base), adapter=alone) == greedy
    assert sys.modules.pop("own_method")  # which registers the adapter's config


def test_chat_template_of_the_run_stays_with_its_adapter(tmp_path):
    base, template, tokenizer = tmp_path / "base", tmp_path / "run.jinja", byte_level()
    tokenizer.chat_template = "its own"
    for part in (tiny_llama(), tokenizer):
        part.save_pretrained(base)
    template.write_text(TEMPLATE)
    (tmp_path / "train.jsonl").touch()
    module = AdaptationModule(CausalLanguageModel(str(base)), LoRAConfig(targets=["q_proj"], r=2))
    module.configure_model()
    files = {"directory": str(tmp_path), "tokenizer": str(base), "chat_template": str(template)}
    data = InstructionDataModule("custom", prompt="chat", **files)
    module._trainer = SimpleNamespace(datamodule=data)
    module.save_adapter(tmp_path / "adapter", {})
    template.unlink()
    assert "| prompt | chat, by chat_template in adapter.json |" in (tmp_path / "adapter/README.md").read_text()
    trained = load_trained(str(tmp_path / "adapter"), model=str(base))
    assert trained.style == "chat"
    assert trained.task.tokenizer.decode(trained.encode(question_of("hi"))) == "<user>hi<a>"
    again = AdaptationModule(module.task, module.adapter, adapter_path=str(tmp_path / "adapter"))
    _write_merged(SimpleNamespace(model=again, datamodule=None), tmp_path / "merged")
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == TEMPLATE


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("generate --adapter nowhere --prompt a", "--adapter nowhere does not exist; give a run's directory"),
        ("generate --adapter {here} --prompt a", "has no adapter; give a run's directory"),
        (
            "generate --adapter {images} --prompt a",
            "was trained for ImageClassification; an adapter of a causal language model",
        ),
        ("generate --adapter {run} --prompt=", "--prompt is empty; give a text, or --prompts FILE"),
        ("generate --adapter {run} --prompt a --prompts b", "--prompt and --prompts are two sources; give one of them"),
        ("generate --adapter {run} --prompts nowhere.txt", "--prompts nowhere.txt does not exist"),
        ("generate --adapter {run} --prompts {empty}", "has no prompts"),
        ("generate --adapter {run} --prompts {wrong}", "record 1 is {'question': 1}; expected a text, or an object with"),
        ("generate --adapter {run} --prompt a --top_p 0.5", "--top_p 0.5 needs a --temperature above 0"),
        ("generate --adapter {run} --prompt a --temperature 1 --top_p 0", "top_p=0.0 must be above 0, at most 1"),
        ("generate --adapter {run} --prompt a --style chat", "the tokenizer has no chat template"),
        ("generate --adapter {run} --prompt {long}", "tokens, and the model reads 2,048; shorten it"),
        ("generate --adapter {run} --promt a", "--promt is no option; did you mean --prompt?"),
        ("generate --prompt a", "--adapter is missing"),
        ("evaluate --adapter {run} --tasks boolq --num_fewshot=-1", "num_fewshot=-1 must be >=0"),
        ("evaluate --adapter {run} --tasks boolq --limit some", "limit=some must be a whole number"),
        ("generate --adapter {run} --prompt a --max_new_tokens some", "max_new_tokens=some must be a whole number"),
        ("chat --adapter {run} --system Hi", "--system needs the tokenizer's chat template"),
        ("evaluate --adapter {run} --tasks boolq", "evaluate needs lm-evaluation-harness"),
    ],
)
def test_mistake_is_one_line(main, run, base, tmp_path, capsys, monkeypatch, words, line):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "wrong.json").write_text('[{"question": 1}]')
    if "{images}" in words:
        model = CausalLanguageModel(str(base), tokenizer="bytes").build()
        inject(model, ADAPTER)
        save_adapter(model, tmp_path / "images", task={"class": "ImageClassification", "pipeline_tag": "image-classification"})
    files = {"empty": tmp_path / "empty.txt", "wrong": tmp_path / "wrong.json", "images": tmp_path / "images"}
    with pytest.raises(SystemExit) as stop:
        train.run([word.format(here=tmp_path, run=run, long="a" * 3000, **files) for word in words.split(" ")])
    text = (stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err).strip()
    assert text.startswith("error: ")
    assert line in text
    assert "\n" not in text


# ---------------------------------------------------------------- chat


def type_in(monkeypatch, *lines):
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_messages_of_a_chat_without_a_template_are_questions_of_their_own(command, monkeypatch, capsys):
    (answer,) = command("generate", prompt=QUESTION.replace("\n", " "))
    capsys.readouterr()
    type_in(monkeypatch, "hello", "/reset", "", *[QUESTION.replace("\n", " ")] * 2, "/quit", "never read")
    messages = command("chat")
    assert [message["content"] for message in messages[1::2]] == [answer] * 2
    assert capsys.readouterr().out.count(answer) == 2


def test_conversation_with_a_template(command, monkeypatch, with_template, capsys):
    type_in(monkeypatch, "one", "two")
    messages = command("chat", style="chat", system="Be brief.")
    assert [message["role"] for message in messages] == ["system", *["user", "assistant"] * 2]
    text = "<system>Be brief.<user>one<assistant>" + messages[2]["content"] + "<user>two<a>"
    assert command("generate", style="none", prompt=text) == [messages[4]["content"]]


def test_interrupted_answer_is_forgotten_and_interrupted_prompt_ends(command, monkeypatch, capsys):
    answers = iter([KeyboardInterrupt, ["yes"]])

    def answer(*_):
        found = next(answers)
        if found is KeyboardInterrupt:
            raise KeyboardInterrupt
        return found

    lines = iter(["a", "b" * 3000, "c"])

    def read(_):
        try:
            return next(lines)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(TrainedModel, "answer", answer)
    monkeypatch.setattr("builtins.input", read)
    assert [message["content"] for message in command("chat")] == ["c", "yes"]
    assert "tokens, and the model reads 2,048; shorten it" in capsys.readouterr().out


# ---------------------------------------------------------------- evaluate


@pytest.mark.parametrize("scoring", ["generate", "likelihood"])
def test_harness_has_the_answers_and_accuracies_of_test(command, base, run, data, tmp_path, capsys, monkeypatch, scoring):
    lm_eval = pytest.importorskip("lm_eval", reason="the extra eval: 20 packages, and seconds of import, for a command")
    samples, evaluate = {}, lm_eval.simple_evaluate

    def kept(**options):
        results = evaluate(**{**options, "log_samples": True})
        samples.update(results.pop("samples"))
        return results

    monkeypatch.setattr(lm_eval, "simple_evaluate", kept)
    rows = rows_of_test(base, run, data, scoring)
    own = tmp_path / "run"
    own.mkdir()
    (own / "adapter").symlink_to(run / "adapter")
    write_config(own, str(base), scoring)
    names = {"llm_adapters_boolq": "boolq", "llm_adapters_arc_easy": "ARC-Easy"}
    found = command("evaluate", tasks=",".join(names), directory=str(tmp_path), batch_size=3, adapter=own)
    for name, set_name in names.items():
        expected = rows[set_name]
        assert found["results"][name]["acc,none"] == sum(row["correct"] for row in expected) / len(expected)
        asked = sorted(samples[name], key=lambda sample: sample["doc_id"])
        assert [harness_answer(sample, scoring) for sample in asked] == [row["output"] for row in expected]
    assert len({row["output"] for expected in rows.values() for row in expected}) > 1
    assert json.loads((own / "lm_eval_0.json").read_text())["prompt"] == "plain"
    assert "llm_adapters_boolq" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--num_fewshot 2 has no effect on llm_adapters_boolq"):
        command("evaluate", tasks="llm_adapters_boolq", num_fewshot=2, adapter=own)


def harness_answer(sample, scoring):
    """The text that the model gave to a question of the harness."""
    if scoring == "generate":
        return sample["filtered_resps"][0].strip()
    best = max(range(len(sample["filtered_resps"])), key=lambda choice: sample["filtered_resps"][choice][0])
    return sample["arguments"][best][1]


def test_names_of_tasks():
    tasks = ["arc_easy", "arc_challenge", "boolq"]
    known = SimpleNamespace(all_tasks=["arc_group", *tasks], all_subtasks=tasks)
    assert known_tasks(["boolq", "arc_*", "arc_group", "llm_adapters_arc_*"], known) == [
        *("boolq", "arc_easy", "arc_challenge", "arc_group"),
        *("llm_adapters_arc_easy", "llm_adapters_arc_challenge"),
    ]
    with pytest.raises(ValueError, match=r"--tasks bolq is no task.*did you mean boolq"):
        known_tasks(["bolq"], known)
    with pytest.raises(ValueError, match="--tasks is empty"):
        known_tasks([""], known)


def test_every_benchmark_has_a_name_without_capitals():
    assert len(BENCHMARKS) == 14
    assert all(name == name.lower() for name in BENCHMARKS)
