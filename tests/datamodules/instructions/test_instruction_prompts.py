import pytest
from support.tokenizers import TOKENIZERS, llama_like
from transformers import CanineTokenizer

from datamodules.instructions.benchmarks import COMMONSENSE, MATH
from datamodules.instructions.dataset import IGNORED, Collator, EvaluationDataset, Example, TrainDataset
from datamodules.instructions.reading.records import Record
from datamodules.instructions.tokenizing.prompts import STYLES
from datamodules.instructions.tokenizing.text import InstructionTokenizer
from datamodules.shared.tokenizers import load_tokenizer

RECORD = Record("Is water wet?\n\nAnswer format: true/false", "", "the correct answer is true", "true")
LONG = Record(" ".join(f"word{i}" for i in range(40)), "", "the correct answer is true", "true")
SPACES = "                "


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def text(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


# Prompts


def test_llm_adapters_prompts_have_the_scripts_white_space():
    style = STYLES["llm_adapters"]
    first = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    record = Record("Do it.", "", "done", "done")
    assert style.training(record).text + style.response("done") == "\n".join(
        [
            f"{first}  ",
            "",
            f"{SPACES}### Instruction:",
            f"{SPACES}Do it.",
            SPACES,
            f"{SPACES}### Response:",
            f"{SPACES}done",
        ]
    )
    assert style.evaluation(record).text == "\n".join(
        [f"{first} ", "", f"{SPACES}### Instruction:", f"{SPACES}Do it.", "", f"{SPACES}### Response:", SPACES]
    )


def test_llm_adapters_prompt_with_an_input():
    prompt = STYLES["llm_adapters"].training(Record("Add.", "1 2", "3", "3"))
    assert prompt.head.startswith(
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a response"
    )
    assert prompt.question == f"Add.\n{SPACES}\n{SPACES}### Input:\n{SPACES}1 2"
    assert prompt.tail == f"\n{SPACES}\n{SPACES}### Response:\n{SPACES}"
    assert prompt.head.partition("\n")[0].endswith("the request. ")


def test_llm_adapters_evaluation_prompt_with_an_input_has_no_space_at_the_end_of_its_first_line():
    first = (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a response "
        "that appropriately completes the request."
    )
    assert STYLES["llm_adapters"].evaluation(Record("Add.", "1 2", "3", "3")).text == "\n".join(
        [
            first,
            "",
            f"{SPACES}### Instruction:",
            f"{SPACES}Add.",
            "",
            f"{SPACES}### Input:",
            f"{SPACES}1 2",
            "",
            f"{SPACES}### Response:",
            SPACES,
        ]
    )


def test_plain_prompt_is_the_same_in_training_and_evaluation():
    style = STYLES["plain"]
    record = Record(" Add. ", "1 2", "\nA: 3", "3")
    assert style.training(record) == style.evaluation(record)
    assert style.training(record).text + style.response(record.output) == "Question: Add.\n1 2\nAnswer: A: 3"


# Tokens


@pytest.mark.parametrize("style", STYLES)
def test_prompt_and_response_are_tokenized_as_one_text(tokenizer, style):
    coder = InstructionTokenizer(tokenizer, STYLES[style], 1000)
    (example,) = coder.examples([RECORD])
    whole = STYLES[style].training(RECORD).text + STYLES[style].response(RECORD.output)
    special = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    assert example.ids == [*special, *tokenizer(whole, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert (example.question_cut, example.response_cut) == (0, 0)
    assert text(tokenizer, example.ids[example.prompt_length :]) == RECORD.output
    assert text(tokenizer, example.ids[: example.prompt_length]) == STYLES[style].training(RECORD).text.strip()


@pytest.mark.parametrize("response", ["42", "the correct answer is true", "(B) it is", "\nA: 42"])
def test_no_token_of_the_prompt_alone_is_learnt(tokenizer, response):
    record = Record("How many?", "", response, "42")
    (example,) = InstructionTokenizer(tokenizer, STYLES["llm_adapters"], 1000).examples([record])
    prompt, learned = example.ids[: example.prompt_length], example.ids[example.prompt_length :]
    given = len(STYLES["llm_adapters"].training(record).text)
    assert len(tokenizer.decode(prompt, skip_special_tokens=True)) <= given
    assert len(tokenizer.decode([*prompt, learned[0]], skip_special_tokens=True)) > given
    assert learned[-1] == tokenizer.eos_token_id


def test_slow_tokenizers_are_refused():
    with pytest.raises(ValueError, match="tokenizer: a CanineTokenizer cannot tell where the prompt's tokens end"):
        InstructionTokenizer(CanineTokenizer(), STYLES["plain"], 1000)


def test_bos_comes_once_and_only_where_the_tokenizer_has_one(tokenizer):
    coder = InstructionTokenizer(tokenizer, STYLES["plain"], 1000)
    (example,) = coder.examples([RECORD])
    ((prompt, ids),) = coder.prompts([RECORD])
    bos = tokenizer.bos_token_id
    for sequence in (example.ids, ids):
        assert sequence.count(bos) == (bos is not None)
    assert bos is None or (example.ids[0], ids[0]) == (bos, bos)
    assert tokenizer.eos_token_id not in ids
    assert example.ids[: len(ids)] == ids  # the plain prompt's tokens are the beginning of the training example's
    assert text(tokenizer, ids) == prompt.text


def test_a_long_question_loses_its_beginning_and_the_response_stays(tokenizer):
    coder = InstructionTokenizer(tokenizer, STYLES["plain"], 1000)
    (whole,) = coder.examples([LONG])
    for length in range(len(whole.ids) - 25, len(whole.ids) + 1):
        (example,) = InstructionTokenizer(tokenizer, STYLES["plain"], length).examples([LONG])
        assert len(example.ids) == length
        assert example.question_cut == len(whole.ids) - length
        assert example.response_cut == 0
        assert example.ids[example.prompt_length :] == whole.ids[whole.prompt_length :]
        head = text(tokenizer, example.ids[: example.prompt_length])
        assert head.startswith("Question:")
        assert head.endswith("word39\nAnswer:")


def test_a_response_that_does_not_fit_loses_its_end(tokenizer):
    record = Record("word1 word2", "", LONG.instruction, "x")
    (whole,) = InstructionTokenizer(tokenizer, STYLES["plain"], 1000).examples([record])
    (example,) = InstructionTokenizer(tokenizer, STYLES["plain"], len(whole.ids) - 20).examples([record])
    assert len(example.ids) == len(whole.ids) - 20
    assert example.response_cut == 20
    answered = example.ids[example.prompt_length :]
    assert answered == whole.ids[whole.prompt_length :][: len(answered)]
    assert tokenizer.eos_token_id not in answered
    assert example.question_cut == 0  # a short question stays


@pytest.mark.parametrize("style", STYLES)
def test_the_shortest_possible_length_has_a_token_of_the_response_and_less_is_an_error(tokenizer, style):
    def examples(length):
        return list(InstructionTokenizer(tokenizer, STYLES[style], length).examples([LONG]))

    with pytest.raises(ValueError, match=r"max_length=5 has no room .* give at least \d+") as error:
        examples(5)
    least = int(str(error.value).rsplit(" ", 1)[1])
    (example,) = examples(least)
    assert len(example.ids) == least
    assert example.prompt_length < least
    with pytest.raises(ValueError, match="max_length"):
        examples(least - 1)


def test_prompts_are_never_cut(tokenizer):
    ((_, ids),) = InstructionTokenizer(tokenizer, STYLES["plain"], 30).prompts([LONG])
    assert "word0 word1" in text(tokenizer, ids)


@pytest.mark.parametrize("change", ["nothing", "question", "response", "style", "max_length", "tokenizer", "eos"])
def test_the_key_of_examples_names_all_that_they_depend_on(change):
    tokenizer = load_tokenizer("bytes") if change == "tokenizer" else llama_like()
    if change == "eos":
        tokenizer.eos_token = "<unk>"
    question, response = ("Is it?", RECORD.output) if change == "question" else (RECORD.instruction, RECORD.output)
    record = Record(question, "", "so it is" if change == "response" else response, "true")
    style = STYLES["llm_adapters" if change == "style" else "plain"]
    key = InstructionTokenizer(tokenizer, style, 99 if change == "max_length" else 100).key([record])
    same = InstructionTokenizer(llama_like(), STYLES["plain"], 100).key([RECORD])
    assert (key == same) is (change == "nothing")


# Batches


def batch(dataset, tokenizer):
    return Collator(tokenizer.pad_token_id)([dataset[index] for index in range(len(dataset))])


def examples(*records, benchmark=COMMONSENSE["boolq"], task="boolq"):
    return [Example(f"{task}/{number}", record, benchmark, task) for number, record in enumerate(records)]


@pytest.mark.parametrize("train_on_prompt", [False, True])
def test_training_batch(tokenizer, train_on_prompt):
    coder = InstructionTokenizer(tokenizer, STYLES["plain"], 1000)
    dataset = TrainDataset(examples(RECORD, LONG), coder, train_on_prompt=train_on_prompt)
    found = batch(dataset, tokenizer)
    assert (found["id"], found["task"]) == (["boolq/0", "boolq/1"], ["boolq", "boolq"])
    assert found["input_ids"].shape == found["attention_mask"].shape == found["labels"].shape == (2, max(dataset.lengths))
    assert found["attention_mask"].sum(1).tolist() == dataset.lengths
    for row, record in enumerate((RECORD, LONG)):
        ids, mask, labels = (found[name][row] for name in ("input_ids", "attention_mask", "labels"))
        assert mask.tolist() == sorted(mask.tolist(), reverse=True)  # padded on the right
        assert (labels[mask == 0] == IGNORED).all()
        assert (labels == ids)[labels != IGNORED].all()
        learned = ids[labels != IGNORED]
        assert learned[-1] == tokenizer.eos_token_id  # also where it is the padding token
        if train_on_prompt:
            assert len(learned) == dataset.lengths[row]
        else:
            assert text(tokenizer, learned) == record.output


def test_evaluation_batch(tokenizer):
    coder = InstructionTokenizer(tokenizer, STYLES["plain"], 1000)
    dataset = EvaluationDataset(examples(RECORD, LONG), coder, train_on_prompt=False)
    found = batch(dataset, tokenizer)
    assert found["prompt_ids"].shape == found["prompt_mask"].shape
    for row in range(2):
        mask = found["prompt_mask"][row]
        assert mask.tolist() == sorted(mask.tolist())  # padded on the left
        assert text(tokenizer, found["prompt_ids"][row][mask == 1]) == found["prompt"][row]
        assert text(tokenizer, found["labels"][row][found["labels"][row] != IGNORED]) == RECORD.output
    assert found["answer"] == ["true", "true"]
    assert found["choices"] == [("true", "false")] * 2
    assert found["responses"] == [(" the correct answer is true", " the correct answer is false")] * 2
    assert found["benchmark"][0].grade("true", found["answer"][0]).correct


def test_sets_whose_outputs_may_be_wrong_have_no_labels(tokenizer):
    coder = InstructionTokenizer(tokenizer, STYLES["plain"], 1000)
    record = Record("2 + 2?", "", "The answer is 5.", "4.0")
    dataset = EvaluationDataset(examples(record, benchmark=MATH["gsm8k"], task=None), coder, train_on_prompt=False)
    found = batch(dataset, tokenizer)
    assert {"labels", "input_ids", "attention_mask", "task"}.isdisjoint(found)
    assert (found["choices"], found["responses"]) == ([()], [()])
