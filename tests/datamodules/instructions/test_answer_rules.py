import pickle
import re

import pytest

from datamodules.instructions.answers.rules import (
    ANSWER,
    BOOLEAN,
    ENDING,
    LETTER,
    NUMBER,
    OPTION,
    SOLUTION,
    TEXT,
    first_turn,
    rule_of,
)
from datamodules.instructions.benchmarks import COMMONSENSE, MATH

BENCHMARKS = {**COMMONSENSE, **MATH}
GOLD = {
    ANSWER: "answer2",
    BOOLEAN: "true",
    ENDING: "ending4",
    LETTER: "C",
    NUMBER: "12.5",
    OPTION: "option1",
    SOLUTION: "solution2",
}
WRONG = {
    ANSWER: "answer3",
    BOOLEAN: "false",
    ENDING: "ending1",
    LETTER: "B",
    NUMBER: "12.6",
    OPTION: "option2",
    SOLUTION: "solution1",
}


def graded(rule, output, answer="0"):
    grade = rule.grade(output, answer)
    return grade.extracted, grade.strict_extracted


def test_the_tables_have_fourteen_benchmarks():
    assert len(BENCHMARKS) == 14


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_right_answer_is_right_a_wrong_one_and_none_are_wrong(name):
    benchmark = BENCHMARKS[name]
    gold, wrong = GOLD[benchmark.rule], WRONG[benchmark.rule]
    for text in (gold, f"the correct answer is {gold}", f"The answer is {gold}.\n"):
        grade = benchmark.grade(text if benchmark.rule is not LETTER else text.replace("The ", "the "), gold)
        assert (grade.correct, grade.strict_correct) == (True, True)
    grade = benchmark.grade(f"the correct answer is {wrong}", gold)
    assert (grade.extracted, grade.correct, grade.strict_extracted, grade.strict_correct) == (wrong, False, wrong, False)
    for nothing in ("", "  \n", "no idea"):
        grade = benchmark.grade(nothing, gold)
        assert (grade.extracted, grade.correct, grade.strict_extracted, grade.strict_correct) == (None, False, None, False)


@pytest.mark.parametrize(
    ("rule", "output", "published", "strict"),
    [
        # The published rule takes the first, wherever it stands.
        (ANSWER, "answer1/answer2/answer3", "answer1", None),
        (ANSWER, "answer1 looks right, but the correct answer is answer3", "answer1", "answer3"),
        (ANSWER, "the correct answer is answer1. No, the answer is answer2", "answer1", "answer2"),
        (ANSWER, "answer15", "answer1", None),
        (ANSWER, "answer9", None, None),
        (ANSWER, "answer2, yes, answer2", "answer2", "answer2"),
        (ANSWER, 'The answer is: "answer4"', "answer4", "answer4"),
        (ANSWER, "the correct answer is answer2\n\n### Instruction:\nthe correct answer is answer3", "answer2", "answer2"),
        (ANSWER, "Answer2", None, "answer2"),
        (BOOLEAN, "the correct answer is True", None, "true"),
        (BOOLEAN, "that is untrue", "true", None),
        (BOOLEAN, "it is not true, it is false", "true", "false"),
        (BOOLEAN, "falsetrue", "false", None),
        (SOLUTION, "solution12", "solution1", None),
        # Any capital letter from A to E counts for the published rule.
        (LETTER, "A train runs. The answer is (D).", "A", "D"),
        (LETTER, "Because 2 + 2 = 4, the answer is D", "B", "D"),
        (LETTER, "the answer is option E", "E", "E"),
        (LETTER, "B", "B", "B"),
        (LETTER, "(B) 12", "B", "B"),
        (LETTER, "B) 12", "B", "B"),
        (LETTER, "A: 12 km", "A", "A"),
        (LETTER, "we get 12, which is (C)", "C", "C"),
        (LETTER, "either (C) or (D)", "C", None),
        (LETTER, "Each Cat", "E", None),
        (LETTER, "the answer is b", None, None),
        (LETTER, "The answer is A's", "A", None),
        # The last number after all commas are gone.
        (NUMBER, "The answer is 1,234.", "1234.", "1234"),
        (NUMBER, "The answer is $1,234,567.50 a year, see step 2.", "2.", "1234567.50"),
        (NUMBER, "The answer is 5. Question 2 is next.", "2", "5"),
        (NUMBER, "12-7", "-7", "7"),
        (NUMBER, "it is -7", "-7", "-7"),
        (NUMBER, "#### 42", "42", "42"),
        (NUMBER, "3 apples #### 1,042 of 2", "2", "1042"),
        (NUMBER, "The answer is 4 + 5 = 9 apples.", "9", "9"),
        (NUMBER, "The answer is:\n18 of 20", "20", "18"),
        (NUMBER, "1,2,3", "123", "3"),
        (NUMBER, "The answer is unknown; 3 or 4", "4", None),
        (NUMBER, "The answer is unknown. 3 or 4", "4", None),
        (NUMBER, "The answer is .5", "5", ".5"),
        (NUMBER, "The answer is 5.\nQuestion: What is 6 + 6?", "6", "5"),
        (NUMBER, "the answer is 3.\n   ### Instruction:\n   the answer is 4", "4", "3"),
    ],
)
def test_what_each_rule_reads(rule, output, published, strict):
    assert graded(rule, output) == (published, strict)


@pytest.mark.parametrize(
    ("output", "strict"),
    [
        ("The answer is \u22125.", "-5"),
        ("it is \u22125", "-5"),
        ("The answer is \u2212$1,234.50", "-1234.50"),
        ("The answer is $\u22125$.", "-5"),
        ("The answer is 1/2.", "0.5"),
        ("The answer is -1/2", "-0.5"),
        (r"The answer is $\frac{1}{2}$.", "0.5"),
        (r"\boxed{-\dfrac{3}{4}}", "-0.75"),
        (r"\boxed{2\frac12}", "2.5"),
        ("The answer is 2 1/2 hours", "2.5"),
        ("The answer is 2\u00bd hours", "2.5"),
        ("The answer is \u00bd", "0.5"),
        ("The answer is 3\u20442", "1.5"),
        ("The answer is 1.5e3", "1500"),
        ("The answer is 1.5E-3", "0.0015"),
        ("The answer is 1.5 \u00d7 10\u00b3 m\u00b2", "1500"),
        (r"The answer is $1.5 \times 10^{3}$", "1500"),
        ("The answer is 10^6", "1000000"),
        ("The answer is 1 000.", "1000"),
        ("The answer is 1\u00a0000\u202f000", "1000000"),
        ("The answer is 1\u2009234.5", "1234.5"),
        ("The answer is 1.000.000 inhabitants", "1000000"),
        (r"so \boxed{9{,}500} apples.", "9500"),
        (r"so \boxed{9\,500}; check: 95 times 100", "9500"),
        (r"\[ \boxed{\text{42 apples}} \]", "42"),
        (r"\boxed{42\%}", "42"),
        (r"\boxed{\$42}", "42"),
        (r"\boxed{1}, no, \boxed{2}", "2"),
        (r"\boxed{x = 7}", "7"),
        ("**Answer:** 7 of 9", "7"),
        ("The answer is **7** of 9", "7"),
        ("The answer is 20%.", "20"),
        ("The answer is \u20ac5", "5"),
        ("The answer is \uff11\uff12\uff0c\uff13\uff14\uff15", "12345"),
        ("The answer is 7.", "7"),
        ("The answer is 7.0.", "7.0"),
        ("The answer is 5 km^2.", "5"),
        ("an area of 5 m\u00b2", "5"),
        ("The answer is - 5 apples", "5"),
        # Two answers, or two readings of one, are none.
        ("The answer is 1,5", None),
        ("The answer is 5 or 6", None),
        ("The answer is 5-6", None),
        ("The answer is 5 to 6", None),
        ("The answer is 4 + 5", None),
        ("The answer is 10/3/2024", None),
        ("The answer is 1/0", None),
        ("The answer is 9^999", None),
        ("The answer is 1/" + "9" * 5000, None),
    ],
)
def test_numbers_are_read_as_they_are_written(output, strict):
    grade = NUMBER.grade(output, strict or "5")
    assert (grade.strict_extracted, grade.strict_correct) == (strict, strict is not None)


@pytest.mark.parametrize(
    ("output", "strict"),
    [
        (r"\boxed{B}", "B"),
        (r"so it is $\boxed{\text{B}}$.", "B"),
        (r"\boxed{\textbf{(B)}\ 12}", "B"),
        (r"\boxed{b}", "B"),
        ("We get 12.\n**B**", "B"),
        ("We get 12, which is **B) 12**", "B"),
        ("Option B", "B"),
        ("so option B fits", "B"),
        ("B is correct", "B"),
        ("Hence (B) is the correct answer, not C.", "B"),
        ("The correct option is B", "B"),
        ("The correct choice is: (B)", "B"),
        ("answer: B", "B"),
        ("Answer: b)", "B"),
        ("**Answer: B**", "B"),
        ("b) 12", "B"),
        ("(b)", "B"),
        ("b", "B"),
        ("The answer is \uff08\uff22\uff09", "B"),
        ("Option A is wrong. The answer is B", "B"),
        # Two answers are none, and neither are words.
        ("The answer is A or B", None),
        ("The answer is (A) and (B)", None),
        ("(A) or (B)", None),
        ("Option A or option B", None),
        ("Either A or B is correct", None),
        ("Neither A nor B is correct", None),
        ("A is not correct", None),
        (r"\boxed{12}", None),
        ("a train is late", None),
        ("e.g. a train", None),
        ("**A train** is late", None),
        ("Answer Choices: (A) 5 (B) 6", None),
    ],
)
def test_letters_are_read_as_they_are_written(output, strict):
    assert LETTER.grade(output, "B").strict_extracted == strict


@pytest.mark.parametrize(
    ("rule", "output", "strict"),
    [
        (BOOLEAN, "True", "true"),
        (BOOLEAN, "TRUE.", "true"),
        (BOOLEAN, "**False**", "false"),
        (BOOLEAN, r"\boxed{\text{True}}", "true"),
        (BOOLEAN, "Yes", "true"),
        (BOOLEAN, "No, it does not.", "false"),
        (BOOLEAN, "The answer is yes.", "true"),
        (BOOLEAN, "The answer is: No", "false"),
        (BOOLEAN, "it isn\u2019t true", None),
        (BOOLEAN, "it cannot be true", None),
        (BOOLEAN, "The answer is true or false", None),
        (BOOLEAN, "The answer is true/false", None),
        (BOOLEAN, "Yes, it is false", None),
        (BOOLEAN, "no idea", None),
        (BOOLEAN, "There is no doubt, yes", None),
        (ANSWER, "Answer 2", "answer2"),
        (ANSWER, "The answer is Answer 2.", "answer2"),
        (ANSWER, "The answer is answer1/answer2", None),
        (ANSWER, "The answer is answer1 and not answer2", "answer1"),
        (ANSWER, "answer 2.5", None),
        (OPTION, r"\boxed{option 1}", "option1"),
        (SOLUTION, "Solution 2 is better than nothing", "solution2"),
        (ENDING, "ENDING_4", "ending4"),
    ],
)
def test_words_are_read_as_they_are_written(rule, output, strict):
    assert rule.grade(output, "other").strict_extracted == strict


@pytest.mark.parametrize("output", ["The answer is \u22125", r"\boxed{9{,}500}", "1.5e3", "True", "yes", r"\boxed{B}", "**b**"])
def test_published_rules_read_the_output_as_it_is(output):
    """LLM-Adapters' scripts, word for word."""
    text = output.strip()
    numbers = re.findall(r"-?\d+\.?\d*", text.replace(",", ""))
    assert NUMBER.grade(output, "0").extracted == (numbers[-1] if numbers else None)
    assert LETTER.grade(output, "A").extracted == next(iter(re.findall("A|B|C|D|E", text)), None)
    assert BOOLEAN.grade(output, "true").extracted == next(iter(re.findall("true|false", text)), None)


@pytest.mark.parametrize(
    ("output", "answer", "correct"),
    [
        ("8", "8.0", True),
        ("8.", "8", True),
        ("8.0009", "8", True),
        ("8.002", "8", False),
        ("-8", "8", False),
        ("1,000", "1000", True),
        ("1000", "1,000", True),
    ],
)
def test_numbers_agree_within_a_thousandth(output, answer, correct):
    assert NUMBER.grade(output, answer).correct is correct


def test_letters_and_choices_agree_only_if_equal():
    assert not LETTER.grade("B", "b").correct
    assert not ANSWER.grade("answer1", "answer11").correct


def test_text_is_compared_but_for_white_space():
    assert TEXT.grade(" two\n words ", "two words").correct
    grade = TEXT.grade("two words\n### Instruction: and now?", "two words")
    assert (grade.correct, grade.strict_correct) == (False, True)


@pytest.mark.parametrize(
    ("answer", "rule"),
    [
        ("true", BOOLEAN),
        ("solution1", SOLUTION),
        ("answer5", ANSWER),
        ("ending3", ENDING),
        ("option2", OPTION),
        ("E", LETTER),
        ("-3", NUMBER),
        ("1,000.5", NUMBER),
        ("F", TEXT),
        ("nan", TEXT),
        ("answer6", TEXT),
    ],
)
def test_the_form_of_the_gold_answer_decides_the_rule(answer, rule):
    assert rule_of(answer) is rule


def test_published_rules_stop_where_the_model_writes_the_next_response():
    output = "the answer is 3.\n\n### Instruction:\nAdd 4 and 4.\n\n### Response:\n8"
    grade = NUMBER.grade(output, "4")
    assert (grade.extracted, grade.correct, grade.strict_extracted) == ("4.", True, "3")
    assert graded(ANSWER, "### Response: answer1") == (None, "answer1")


def test_first_turn_keeps_an_output_that_only_begins_like_a_question():
    assert first_turn("Question: what?") == "Question: what?"
    assert first_turn("5\nQuestion: what?") == "5"
    assert first_turn("\n\n5\n\n \n\t### Instruction: what?") == "5"


@pytest.mark.parametrize(
    ("name", "instruction", "choices"),
    [
        ("ARC-Easy", "Which?\n\nAnswer format: answer1/answer2/answer3", ("answer1", "answer2", "answer3")),
        ("ARC-Easy", "Which?", ("answer1", "answer2", "answer3", "answer4", "answer5")),
        ("ARC-Easy", "Which?\n\nAnswer format: yes/no", ("answer1", "answer2", "answer3", "answer4", "answer5")),
        ("boolq", "Is it? Answer format: true/false", ("true", "false")),
        ("gsm8k", "How many?", ()),
        ("AQuA", "How many? Answer format: A/B", ()),
    ],
)
def test_choices_are_those_that_the_question_offers(name, instruction, choices):
    assert BENCHMARKS[name].choices(instruction) == choices


def test_benchmarks_go_to_loading_processes():
    assert pickle.loads(pickle.dumps(COMMONSENSE["piqa"])).grade("solution1", "solution1").correct
