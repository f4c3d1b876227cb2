import pytest

from t2runtime import rewards
from t2runtime.rewards.formulas import normalise


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("1,234", "1234"),
        ("so it is -5", "-5"),
        ("10-5", "5"),
        ("10 - 5", "5"),
        ("a total of $1,234,567.50!", "1234567.5"),
        ("3.0", "3"),
        ("-0", "0"),
        ("007", "7"),
        ("+8 points", "8"),
        ("12 apples and 30 pears", "30"),
        ("1,23", "23"),
        ("\u22125 degrees", "-5"),
        ("5\u20137", "7"),
        ("-$5.50", "-5.5"),
        ("costs \\$1,200 in all", "1200"),
        ("\u20ac 3", "3"),
        ("45%", "45"),
        ("1.5e3 meters", "1500"),
        ("2E-2", "0.02"),
        ("1e999999999", "1"),
        ("3/4 of it", "0.75"),
        ("-7/3.", "-7/3"),
        ("1/0", "0"),
        (".5", "0.5"),
        ("1{,}234", "1234"),
        ("12\u202f345", "12345"),
        ("1,234,56", "56"),
        ("version2", None),
        ("(3)-5", "5"),
        ("$x=-\\frac{3}{4}$", "-0.75"),
        (r"\dfrac12 of 1,000 is \frac{1,000}{2}", "500"),
        ("3 1/2", "3.5"),
        ("-3 1/2 degrees", "-3.5"),
        (r"2\tfrac{1}{2} cups", "2.5"),
        ("in 2024 7/2 of them", "3.5"),
        ("12 cm^2", "12"),
        ("x_2 = 7, x_{3}", "7"),
        ("an area of 10^3", None),
        (r"so 3, or 5\sqrt{2}", "3"),
        (r"2\pi", None),
        (r"90^\circ", "90"),
        ("no digits", None),
        ("", None),
    ],
)
def test_number(completion: str, answer: str | None) -> None:
    assert rewards.number(completion) == answer


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("(C)", "C"),
        ("B", "B"),
        ("2", "B"),
        ("A or rather D.", "D"),
        ("The answer is (C)", "C"),
        ("the answer is c.", "C"),
        ("The correct answer is **B**", "B"),
        ("Answer: 3", "C"),
        ("the correct answer is answer4", "D"),
        ("C. A planet in a cold place", "C"),
        ("A) it rains", "A"),
        ("B because a spider has 8 legs", "B"),
        ("I think it is D", "D"),
        ("Option A is wrong. The answer is D", "D"),
        ("$\\boxed{\\text{(B)}}$", "B"),
        ("Not (A), not (B): (D)", "D"),
        ("The answer is (C). Option A is wrong.", "C"),
        ("The answer is C because option B is not a mammal.", "C"),
        ("The correct option is (B), not option A.", "B"),
        ("The answer is option C, choice D is too small", "C"),
        ("Option A is correct because option B is not", "A"),
        ("(B) is right. (A) is wrong.", "B"),
        ("C. Option B is wrong.", "C"),
        ("Answer: 1,200 (D)", "D"),
        ("Answer: 3.5, so B", "B"),
        ("Answer: 2/3, so (B)", "B"),
        ("Answer: $C$", "C"),
        ("The final answer is $\\boxed{C}$, since option A is wrong", "C"),
        ("The answer is A, no, the answer is B", "B"),
        ("Option A is too cold. I take option D", "D"),
        ("a planet", None),
        ("A planet rotates", None),
        ("The answer is a planet", None),
        ("3.5 degrees", None),
        ("12", None),
        ("Cat", None),
        ("9", None),
        ("", None),
    ],
)
def test_choice(completion: str, answer: str | None) -> None:
    assert rewards.choice(completion) == answer


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("2 + 3 = 5\n#### 5 apples, not 6", "5"),
        ("#### 1,234.00\n\nQuestion: 7?\n#### 8", "1234"),
        ("#### -$5", "-5"),
        ("#### nothing, 5", "5"),
        ("####", None),
        ("#### 2 + 3 = 5", "5"),
        ("#### 2 + 3 = 5\nCheck: 5 - 3 = 2", "5"),
        ("####\n**12** of 30", "12"),
        ("#### none\n\nQuestion: 7?", None),
        (r"#### \frac{37}{1}", "37"),
        ("#### 3 1/2 cups", "3.5"),
        ("so \\boxed{12} of 30", "12"),
        (r"so \boxed{\frac{1}{2}}", "0.5"),
        (r"\boxed{\frac{37}{1}}", "37"),
        (r"\boxed{x = -\dfrac34}", "-0.75"),
        (r"\boxed{12 apples} of 30", "12"),
        (r"\boxed{1{,}200\text{ km}}", "1200"),
        (r"\boxed{5\sqrt{2}} or 7", None),
        (r"\boxed{5x} for x = 7", None),
        (r"\boxed{(3, 4)}", None),
        (r"\boxed{x-5}", None),
        (r"\boxed{2 + 3 = 5}", "5"),
        (r"\boxed{} so 7", "7"),
        ("so 12 of 30.", "30"),
    ],
)
def test_final_number(completion: str, answer: str | None) -> None:
    assert rewards.final_number(completion) == answer


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"\frac{1}{2}", r"\dfrac12"),
        (r"\frac{1}{2}", "0.5"),
        (r"\frac{1}{2}", "1/2"),
        (r"-\frac{1}{2}", r"\frac{-1}{2}"),
        (r"1\frac12", "1.50"),
        (r"\frac{10}{4}", r"\tfrac{5}{2}"),
        (r"\frac{1}{3}", r"\frac{2}{6}"),
        ("1,234,567", r"1{,}234{,}567"),
        ("1234", r"1,\!234"),
        ("12", r"12\text{ cm}^2"),
        ("12", r"12\,\mathrm{cm}^{2}"),
        ("12", "12 square inches"),
        ("12", r"\$12.00"),
        ("90", r"90^\circ"),
        ("90", r"90^{\circ}"),
        ("50", r"50\%"),
        ("5", "x = 5"),
        ("5", r"x \in 5"),
        ("-3", "\u22123"),
        (".25", "0.25"),
        ("(1,2)", r"\left( 1, 2 \right)"),
        (r"(\frac12,-3)", "(0.5, -3.0)"),
        (r"[0,\infty)", r"[0, \infty)"),
        (r"\text{even}", "even"),
        (r"\text{Tuesday}.", "Tuesday"),
        (r"\sqrt2", r"\sqrt{2}"),
        (r"2\sqrt{3}", r"2 \sqrt 3"),
        (r"\frac{\sqrt{3}}{2}", r"\dfrac{\sqrt3}{2}"),
        ("x^2+1", "x^2 + 1"),
        ("x^2", "x^{2}"),
        ("x^10", "x^{10}"),
        ("a_{1}+a_n", "a_1 + a_{n}"),
        (r"\frac{a}{b}", "a/b"),
        (r"-\frac{3x}{4}", "-3x/4"),
        (r"\frac{-a}{b}", r"-\frac{a}{b}"),
        (r"\frac{\pi}{2}", r"\pi/2"),
        (r"\frac{\sqrt{3}}{2}", r"\sqrt{3}/2"),
        (r"\frac{x+1}{y}", "(x+1)/y"),
        (r"(\frac{\pi}{2}, 0)", r"(\pi/2, 0)"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
        (r"5\text{ m}", "5"),
        (r"5\,\mathrm{s}", "5"),
        (r"(1{,}234, 5)", r"(1,\!234,5)"),
        ("1, 2, 345", "1,2,345"),
    ],
)
def test_boxed_answers_that_are_the_same(one: str, other: str) -> None:
    first, second = (rewards.boxed("It is $\\boxed{" + text + "}$.") for text in (one, other))
    assert first == second is not None


@pytest.mark.parametrize(
    ("one", "other"),
    [("1", "-1"), ("12", "1,2"), ("(1,2)", "(2,1)"), ("3x", "3"), (r"\sqrt{2}", "2"), ("x", "X"),
     (r"\frac{1}{2}", r"\frac{2}{1}"), ("[1,2)", "(1,2)"), ("2^3", "23"), ("even", "odd"),
     ("5m", "5"), ("3s", "3"), ("2g", "2"), ("(1,234)", "(1234)"), ("(1,234)", "1234"),
     ("1,234", "1, 234"), ("a/bc", r"\frac{a}{b}c"), ("x+1/y", r"\frac{x+1}{y}"),
     (r"\frac{a}{b}", r"\frac{b}{a}"), ("x^23", "x^2 3"), (r"1\\2", "12")],
)  # fmt: skip
def test_boxed_answers_that_differ(one: str, other: str) -> None:
    assert rewards.boxed(f"\\boxed{{{one}}}") != rewards.boxed(f"\\boxed{{{other}}}")


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (r"\boxed{1} or rather \boxed{2}", "2"),
        (r"\boxed{\frac{\sqrt{a+\sqrt{b}}}{c_{1}}}", r"\frac{\sqrt{a+\sqrt{b}}}{c_1}"),
        (r"\boxed{\{1, 2\}}", r"\{1,2\}"),
        (r"\fbox{7}", "7"),
        (r"\boxed 7", "7"),
        (r"\boxed{7", None),
        (r"\boxed{3} and \boxed{7", "3"),
        (r"\boxed{}", None),
        (r"\boxed", None),
        ("7", None),
        (r"\boxed{" + "9" * 5000 + "}", "9" * 5000),
        (r"\boxed{1/0}", r"\frac{1}{0}"),
    ],
)
def test_boxed(completion: str, answer: str | None) -> None:
    assert rewards.boxed(completion) == answer


F = "def f(x):\n    return x\n"


@pytest.mark.parametrize(
    "completion",
    [
        F,
        f"Sure!\n```python\n{F}```\nIt returns x.",
        f"```py\n{F}```",
        f"```Python3 title=a.py\n{F}```",
        f"```\n{F}```",
        f"~~~python\n{F}~~~",
        f"````python\n{F}````",
        f"```python\n{F}",
        f"{F}```\nThat is all.",
        f"```bash\npip install x\n```\n```python\n{F}```",
        f"```python\nprint(f(1))\n```\n```python\n{F}```\n```python\nprint(f(2))\n```",
        f"```python\r\n{F}```".replace("\n", "\r\n").replace("\r\r", "\r"),
        f"[BEGIN]\n{F}[DONE]\nmore",
    ],
)
def test_code(completion: str) -> None:
    found = rewards.code(completion, "f")
    assert found is not None and found.strip() == F.strip()


def test_no_code() -> None:
    assert rewards.code(" \n") is None
    assert rewards.code("```python\n```") is None
    assert rewards.code("```python\nx = 1\n```") == "x = 1\n", "if none defines anything"
    assert rewards.code("```\nf = len\n```\n", "f") == "f = len\n"


def test_code_in_several_blocks() -> None:
    def blocks(*parts: str) -> str:
        return "\n".join(f"So:\n```python\n{part}```" for part in parts)

    helper, user = "import math\ndef g(x):\n    return math.pi\n", "def f(x):\n    return g(x)\n"
    for order in ((helper, user), (user, helper), (helper, "print(f(1))\n", user, "f(2)\n")):
        assert rewards.code(blocks(*order), "f") == helper + user
    assert rewards.code(blocks("def h():\n    pass\n", user), "f") == user, "not used"
    other = "def f(x):\n    return 2\n"
    assert rewards.code(blocks(other, user, helper), "f") == other, "the first is the answer"
    assert rewards.code(blocks(helper, user + "  )\n"), "f") == user + "  )\n", "no Python"
    far = "def g(x):\n    return k\n"
    assert rewards.code(blocks("k = 3\n", far, user), "f") == "k = 3\n" + far + user


def test_label() -> None:
    assert rewards.label(" Card arrival.\nMore") == rewards.label("card_arrival") == "card_arrival"
    assert rewards.label("why-verify identity") == "why_verify_identity"
    assert rewards.label(" \n") is None


@pytest.mark.parametrize("name", rewards.EXTRACTORS)
def test_nothing_breaks_or_hangs(name: str) -> None:
    extract = rewards.EXTRACTORS[name]
    for text in ("", "\x00", "9" * 20_000, "-" * 5000, "1," * 5000, "{" * 5000, "(A" * 3000,
                 "\\boxed{" * 500, "\\text{" * 500, "```" * 1000, "\u2212" * 99, "1/" * 2000,
                 "answer " * 2000, "\\boxed{" + "\\text{" * 300 + "}" * 301,
                 " " * 9000, "9" * 20_000 + "^\\pi", "1 " * 5000 + "\\sqrt", "x^{" * 3000,
                 "\\boxed{" + "ab" * 5000 + "/}", "#### " + "= " * 5000,
                 "\\boxed{" + "a." * 5000 + "5}"):  # fmt: skip
        extract(text)


def test_choices_keyed_by_digits_match_letters() -> None:
    assert rewards.is_correct("The answer is B.", "2", rewards.choice)


def test_reward_is_plus_or_minus_one() -> None:
    assert rewards.is_correct(" 85", "85") and not rewards.is_correct("", "85")
    assert rewards.reward_of(True) == 1.0
    assert rewards.reward_of(False) == -1.0
    assert rewards.reward_of(False, wrong=-0.1) == -0.1


@pytest.mark.parametrize("text", ["1, 234", "x^{10}", r"1\\2", "-a/b", r"(\pi/2, 3{,}000)", "5m"])
def test_one_form_is_its_own(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once


def test_an_answer_without_an_answer_is_an_error() -> None:
    with pytest.raises(ValueError, match="answer must contain"):
        rewards.is_correct("3", "none", rewards.number)
