"""Conversations: their forms, the chat template, which tokens have a loss, and what is cut."""

import json
from datetime import datetime

import datasets
import pytest
from support.tokenizers import TOKENIZERS, byte_level

from datamodules import InstructionDataModule
from datamodules.instructions import data_module as instructions
from datamodules.instructions.arithmetic import ArithmeticDataModule
from datamodules.instructions.dataset import IGNORED
from datamodules.instructions.reading.records import Conversation, Record, parse_record, read_records
from datamodules.instructions.reading.rows import HubSplit, read_rows
from datamodules.instructions.tokenizing.chat import ChatTokenizer
from datamodules.instructions.tokenizing.templates import template_text
from lightning_modules.tasks.generation import _end_tokens

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
# As Qwen3's: only the last turn has its empty thoughts.
CHANGING = (
    "{% for m in messages %}<{{ m.role }}>{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}"
    "{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
SYSTEM_FIRST = "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}" + CHATML
STRICT = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}{% endfor %}"


def say(role, content, **others):
    return {"role": role, "content": content, **others}


TALK = [say("system", "Be brief."), say("user", "Hi"), say("assistant", "Yo"), say("user", "2 + 2?"), say("assistant", "4")]
ALPACA = {"question": "Say hi", "context": "loudly", "reply": "HI"}


def talk(*messages, **others):
    return parse_record({"messages": list(messages), **others}, "line 1", False)


def tokenized(tokenizer, template, record, max_length=1000):
    tokenizer.chat_template = template_text(template) if template == "plain" else template
    coder = ChatTokenizer(tokenizer, None, max_length)
    (example,) = coder.examples([record])
    return coder, example, [tokenizer.decode(example.ids[begin:end]) for begin, end in example.responses]


# Records


def test_the_forms_of_conversations_and_of_names_give_the_same_records(tmp_path):
    sharegpt = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Hi"}, {"from": "GPT", "value": "Yo"}]
    parts = [TALK[0], say("user", [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]), TALK[2]]
    expected = talk(*TALK[:3])
    assert expected == Conversation("Be brief.\nHi", "", "Yo", "Yo", tuple(TALK[:3]), (2,))
    rows = {"messages": TALK[:3]}, {"conversations": sharegpt}, {"messages": parts}
    path = tmp_path / "talk.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert read_records(path, needs_answer=False) == [expected] * 3
    columns = {"instruction": "question", "input": "context", "output": "reply"}
    for name, rows, names, wanted in (
        ("talk", [{"dialog": sharegpt, "id": 1}], {"messages": "dialog"}, expected),
        ("alpaca", [ALPACA], columns, Record("Say hi", "loudly", "HI", "HI")),
    ):
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / f"{name}.parquet")
        assert read_records(tmp_path / f"{name}.parquet", needs_answer=False, columns=names) == [wanted]
    with pytest.raises(
        ValueError, match=r"alpaca.parquet' row 1 has no 'ask', which columns names for instruction; its columns"
    ):
        read_records(tmp_path / "alpaca.parquet", needs_answer=False, columns={"instruction": "ask", "output": "reply"})
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"bad.parquet' is not a complete parquet file"):
        read_records(tmp_path / "bad.parquet", needs_answer=False)


def test_only_answering_turns_with_something_to_say_are_learned():
    call = say("assistant", None, tool_calls=[{"function": {"name": "f"}}])
    messages = [say("assistant", "Welcome"), TALK[1], say("assistant", " "), TALK[1], say("assistant", "no", weight=0), TALK[1]]
    record = talk(*messages, call, say("tool", "7"), say("assistant", "7"), say("user", "Thanks"), tools=[{"name": "f"}])
    assert (record.learned, len(record.messages), record.output, record.tools) == ((6, 8), 9, "7", ({"name": "f"},))
    assert talk(*messages) is None


@pytest.mark.parametrize(
    ("row", "roles", "tools"),
    [
        ({"messages": None, "conversations": TALK[1:3]}, "user assistant", []),
        ({"messages": TALK[1:3], "instruction": None, "system": " ", "tools": ""}, "user assistant", []),
        ({"messages": TALK[1:3], "system": "Be brief."}, "system user assistant", []),
        ({"messages": TALK[:3], "system": "Be brief."}, "system user assistant", []),
        ({"instruction": "Hi", "output": "Yo", "system": "Be brief."}, "system user assistant", []),
        ({"messages": TALK[1:3], "tools": '[{"name": "f"}]'}, "user assistant", [{"name": "f"}]),
    ],
)
def test_what_stands_beside_the_messages_is_read(row, roles, tools):
    record = parse_record(row, "line 1", False)
    assert isinstance(record, Conversation)
    assert [message["role"] for message in record.messages] == roles.split()
    assert [message["content"] for message in record.messages[-2:]] == ["Hi", "Yo"]
    assert (list(record.tools), record.learned) == (tools, (len(record.messages) - 1,))
    renamed = parse_record({f"my {name}": value for name, value in row.items()}, "line 1", False, {n: f"my {n}" for n in row})
    assert renamed == record


@pytest.mark.parametrize(
    ("beside", "message"),
    [
        ({"tools": 5}, "line 1: tools is 5; expected a list of objects, or one as JSON text"),
        ({"tools": "f, g"}, "line 1: tools is 'f, g'; expected a list"),
        ({"tools": {"name": "f"}}, r"line 1: tools is \{'name': 'f'\}; expected a list"),
        ({"system": 5}, "line 1: 'system' is 5; expected text"),
        ({"system": "Be long."}, "line 1 has 'system', and its messages begin with another one; remove one of them"),
        (
            {"messages": [TALK[1], say("assistant", "", tool_calls=["f"])]},
            r"line 1, message 2: tool_calls is \['f'\]; expected",
        ),
    ],
)
def test_what_stands_beside_the_messages_is_checked(beside, message):
    with pytest.raises(ValueError, match=message):
        parse_record({"messages": TALK, **beside}, "line 1", False)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, "line 1: the conversation is None; expected a list of messages"),
        ([], r"line 1: the conversation is \[\]; expected a list of messages"),
        ("Hi", "line 1: the conversation is 'Hi'; expected a list"),
        (["Hi"], "line 1, message 1 is 'Hi'; expected an object with role and content"),
        ([{"text": "Hi"}], "line 1, message 1 has no role and no from; its fields are text"),
        (
            [TALK[0], say("alien", "Hi")],
            "line 1, message 2: the role 'alien' is unknown; expected one of system, developer, user",
        ),
        ([say("user", 7)], "line 1, message 1: the content is 7; expected text"),
        ([say("user", [{"type": "image"}])], r"line 1, message 1: the content is \[\{'type': 'image'\}\]; expected text"),
    ],
)
def test_broken_conversations_are_named(messages, message):
    with pytest.raises(ValueError, match=message):
        parse_record({"messages": messages}, "line 1", False)


def test_fields_that_arrow_fills_in_are_left_out(tmp_path):
    calls = [[{"function": {"name": name, "arguments": {name: 1}}}] for name in "fg"]
    rows = [
        {
            "messages": [TALK[1], say("assistant", None, tool_calls=call)],
            "tools": [{"name": "f", "one": {"is": 1}}, {"name": "g"}],
        }
        for call in calls
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "calls.parquet")
    records = read_records(tmp_path / "calls.parquet", needs_answer=False)
    assert [record.messages[-1]["tool_calls"] for record in records] == calls
    assert [list(record.tools) for record in records] == [row["tools"] for row in rows]


# Tokens


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize(
    ("template", "responses", "ends"),
    [
        ("plain", ["Yo</s>", "4</s>"], True),
        (CHATML, ["Yo<|im_end|>", "4<|im_end|>"], True),
        (SYSTEM_FIRST, ["Yo<|im_end|>", "4<|im_end|>"], True),
        (MARKED, ["Yo</s>", "4</s>"], True),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", ["Yo\n", "4\n"], False),
    ],
)
def test_every_turn_of_the_assistant_is_learned_up_to_its_end(kind, template, responses, ends):
    tokenizer = TOKENIZERS[kind]()
    if template in (CHATML, SYSTEM_FIRST):
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    coder, example, learned = tokenized(tokenizer, template, talk(*TALK))
    assert [text.strip(" ") for text in learned] == responses
    assert (example.question_cut, example.response_cut) == (0, 0)
    if template not in ("plain", MARKED):
        whole = tokenizer.apply_chat_template(TALK, tokenize=True, return_dict=False)
        assert example.ids == whole[: len(example.ids)]
    ((prompt, ids),) = coder.prompts([talk(*TALK)])
    assert example.ids[: len(ids)] == ids
    assert "2 + 2?" in prompt.text
    assert "4" not in prompt.text
    assert len(coder.end_tokens) == ends
    assert [tokenizer.decode(coder.end_tokens)] == ([responses[0][2:]] if ends else [""])
    assert coder.response("true").strip() == "true"


def test_a_question_with_a_response_becomes_two_messages():
    _, example, learned = tokenized(byte_level(), "plain", Record("Add.", "1 2", "3", "3"))
    assert (learned, byte_level().decode(example.ids)) == ([" 3</s>"], "User: Add.\n\n1 2\n\nAssistant: 3</s>")


@pytest.mark.parametrize("max_length", [3, 12, 30, 40, 52, 60, 90])
def test_a_long_conversation_loses_its_end_and_always_keeps_something_to_learn(max_length):
    tokenizer = TOKENIZERS["bytes"]()
    record = talk(*TALK)
    _, whole, _ = tokenized(tokenizer, "plain", record)
    _, example, learned = tokenized(tokenizer, "plain", record, max_length)
    first = whole.responses[0][1]
    assert len(example.ids) <= max_length
    assert " Yo</s>".startswith(learned[0])
    assert learned[0]
    if max_length >= first:
        assert example.ids == whole.ids[: len(example.ids)]
        assert example.response_cut == sum(e - b for b, e in whole.responses) - sum(e - b for b, e in example.responses)
    else:
        assert example.question_cut == whole.responses[0][0] - example.prompt_length
    assert example.responses[-1][1] == len(example.ids)


def test_templates_that_change_what_they_have_written_are_refused_where_it_matters():
    _, _, learned = tokenized(byte_level(), CHANGING, talk(*TALK[:3]))
    assert learned == ["<think></think>Yo</s>"]
    with pytest.raises(
        ValueError, match=r"line 1: the chat template renders the beginning .* its message 3 follows.*generation"
    ):
        tokenized(byte_level(), CHANGING, talk(*TALK))
    with pytest.raises(
        ValueError, match=r"line 1: the chat template does not take the conversation \(TemplateError: no system\)"
    ):
        tokenized(byte_level(), STRICT, talk(*TALK))


CALL = say("assistant", None, tool_calls=[{"function": {"name": "f"}}])
WITHOUT_ANSWERS = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "record", "message"),
    [
        ("plain", talk(TALK[1], CALL), "line 1: the conversation has tool_calls, which the chat template does not render"),
        ("plain", talk(*TALK, tools=[{"name": "f"}]), "line 1: the conversation has tools, which the chat template does not"),
        (WITHOUT_ANSWERS, talk(*TALK), "line 1, message 3: the chat template renders nothing of it, a response to learn; give"),
        (CHATML + "{# tool_calls #}", talk(TALK[1], CALL), "line 1, message 2: the chat template renders nothing of it"),
        ("{% for m in %}", talk(*TALK), "the tokenizer's chat template is not valid Jinja: .*, in line 1"),
    ],
)
def test_templates_that_leave_out_what_is_learned_are_refused(template, record, message):
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    with pytest.raises(ValueError, match=message):
        tokenized(tokenizer, template, record)


def test_a_response_may_be_a_special_token_alone():
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<yes>"]})
    _, _, learned = tokenized(tokenizer, "plain", talk(TALK[1], say("assistant", "<yes>")))
    assert learned == [" <yes></s>"]


def test_the_key_of_conversations_names_what_they_depend_on():
    def key(record=None, template=None, length=50, end="</s>"):
        tokenizer = byte_level()
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
        tokenizer.eos_token = end
        return ChatTokenizer(tokenizer, template or template_text("plain"), length).key([record or talk(*TALK)])

    silent = [*TALK[:2], {**TALK[2], "weight": 0}, *TALK[3:]]
    others = [
        key(talk(*TALK[:3])),
        key(talk(*silent)),
        key(talk(*TALK, tools=[{"name": "f"}])),
        key(length=60),
        key(None, CHATML),
        key(end="<|im_end|>"),
        key(talk(*TALK[:-1], {**TALK[-1], "at": datetime(2026, 1, 1)})),  # as parquet gives times
    ]
    assert key() == key()
    assert len({key(), *others}) == 8


# The DataModule


def module(folder, **arguments):
    given = {"train": "custom", "tokenizer": "bytes", "prompt": "chat", "chat_template": "plain", "num_workers": 0}
    given |= {"validation_size": 0, "batch_size": 2, "directory": str(folder)}
    return InstructionDataModule(**(given | arguments))


@pytest.fixture
def directory(tmp_path):
    rows = [{"messages": [say("user", f"{n} + 1?"), say("assistant", str(n + 1))]} for n in range(6)]
    silent = {"messages": [say("user", "Hello?")]}
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, [*rows, silent])))
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows[:2])))
    return tmp_path


def test_conversations_are_trained_on_validated_and_tested(directory, monkeypatch):
    told = []
    monkeypatch.setattr(instructions, "rank_zero_info", told.append)
    data = module(directory, validation_size=2)
    data.prepare_data()
    for stage in ("fit", "test"):
        data.setup(stage)
    assert "train custom: 6, 1 left out that have no response to learn" in told[0]
    for batch in data.train_dataloader():
        assert {data.load_tokenizer().decode(row[row != IGNORED])[-4:] for row in batch["labels"]} == {"</s>"}
    (batch,) = data.test_dataloader()["custom"]
    assert (batch["prompt"][0], batch["answer"][0], batch["end_tokens"][0]) == ("User: 0 + 1?\n\nAssistant:", "1", (1,))
    assert batch["benchmark"][0].grade(" 1", "1").correct
    assert (batch["labels"] != IGNORED).sum() == 2 * len(" 1</s>".replace("</s>", "."))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"chat_template": None}, r"the tokenizer '.*' has no chat template, .*; give chat_template plain .* or the path"),
        (
            {"chat_template": "nowhere.jinja"},
            "chat_template 'nowhere.jinja' is no file; give plain, or the path of a Jinja file",
        ),
        ({"chat_template": "empty.jinja"}, "chat_template 'empty.jinja' is empty; give plain, or the path of a Jinja file"),
        ({"chat_template": "wrong.jinja"}, "chat_template is not valid Jinja: .*, in line 2"),
        ({"chat_template": "latin.jinja"}, "'latin.jinja' is not UTF-8 text: line 1 has the byte 0xe9, as in Windows-1252"),
        ({"prompt": "plain"}, "chat_template 'plain' has no effect with prompt plain; set prompt to chat"),
        ({"prompt": "plain", "chat_template": None}, "train.jsonl' line 1 has messages, .*; set prompt to chat"),
        (
            {"columns": {"question": "instruction"}},
            "columns: 'question' is unknown; expected some of instruction, input, output",
        ),
        ({"columns": {"instruction": "a"}}, "columns names instruction; expected messages, or instruction and output at least"),
        ({"columns": {}}, "columns names nothing; expected messages, or instruction"),
        ({"columns": {"messages": "a", "output": "b"}}, "columns names messages beside output; a record is a conversation, or"),
        (
            {"columns": {"messages": "dialog"}},
            "line 1 has no 'dialog', which columns names for messages; its columns are messages",
        ),
        ({"train": "hub:squad"}, "train: 'hub:squad' names no data set on the hub; expected hub:owner/name"),
    ],
)
def test_mistakes_are_named_before_any_model_is_loaded(directory, monkeypatch, arguments, message):
    monkeypatch.chdir(directory)
    for name, content in (("empty", b"\n"), ("wrong", b"{{ messages }}\n{% for m in %}"), ("latin", b"\xe9")):
        (directory / f"{name}.jinja").write_bytes(content)

    def prepare():
        data = module(directory, **arguments)
        data.prepare_data()
        data.setup("fit")

    with pytest.raises(ValueError, match=message) as error:
        prepare()
    assert "\n" not in str(error.value)


def test_columns_without_custom_data_are_refused():
    with pytest.raises(ValueError, match="columns is for data of your own, and train and test name none"):
        ArithmeticDataModule(tokenizer="bytes", columns={"messages": "a"})


def test_a_set_of_the_hub_is_read_by_its_columns(tmp_path, monkeypatch):
    folder = tmp_path / "owner/talks"  # `datasets` reads a directory as it reads the hub
    folder.mkdir(parents=True)
    for split, count in (("train", 5), ("test", 2)):
        datasets.Dataset.from_list([ALPACA] * count).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    monkeypatch.chdir(tmp_path)
    names = {"instruction": "question", "input": "context", "output": "reply"}
    data = module(tmp_path, directory=None, train={"hub:owner/talks": 2.0}, test=["hub:owner/talks"], columns=names)
    data.prepare_data()
    for stage in ("fit", "test"):
        data.setup(stage)
    assert [id_ for batch in data.train_dataloader() for id_ in batch["id"]].count("talks/4") == 2
    assert [len(batch["id"]) for batch in data.test_dataloader()["talks"]] == [2]
    with pytest.raises(ValueError, match=r"'hub:owner/talks:dev' cannot be loaded \(.*; without a network give a file of it"):
        module(tmp_path, directory=None, train="hub:owner/talks:dev", columns=names).prepare_data()


def test_names_on_the_hub(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **options: asked.append((names, options)) or [ALPACA])
    written = "hub:owner/name@main/config:train_sft"
    assert str(HubSplit.parse(written)) == written
    assert next(read_rows(written)) == (f"{written} row 1", ALPACA)
    assert asked == [(("owner/name", "config"), {"split": "train_sft", "revision": "main"})]
    data = module(tmp_path, directory=None, train=written)
    assert ([source.name for source in data._sources], data.data_revision) == (["name-config"], "main")
    assert module(tmp_path, directory=None, train="hub:owner/name").data_revision is None
    written = "hub:owner/name@refs/convert/parquet/config"
    assert HubSplit.parse(written) == ("owner/name", "refs/convert/parquet", "config", None)
    mixed = module(tmp_path, directory=None, train=["hub:one/talks", "hub:two/talks:train_sft", "hub:two/other"])
    assert [source.name for source in mixed._sources] == ["one-talks-train", "two-talks-train_sft", "other"]
    with pytest.raises(ValueError, match="train: 'one-talks-train' is there more than once"):
        module(tmp_path, directory=None, train=["hub:one/talks", "hub:one/talks:train"])


def test_generation_ends_where_the_template_ends_a_turn():
    class Model:
        class generation_config:  # noqa: N801
            eos_token_id = 2

    assert _end_tokens(Model, TOKENIZERS["bytes"](), [9, 1]) == [1, 2, 9]


def test_a_template_that_takes_no_simple_conversation_is_warned_of():
    tokenizer = byte_level()
    tokenizer.chat_template = "{{ raise_exception('no tools') }}"
    with pytest.warns(UserWarning, match=r"where a turn ends is unknown.*no tools"):
        assert ChatTokenizer(tokenizer, None, 50).end_tokens == ()
