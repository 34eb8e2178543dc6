"""The figures of docs/results.md, each measured again by the command that stands above it (-m slow: an hour in all).

TOLERANCE is what other processors and versions may change: 0.003 and 0.3 % of a figure, with the rounding of the page.
"""

import json
import os
import re

import pytest
from pages import ROOT, lines

from scaling_perception.cli import main
from scaling_perception.evaluation.comparisons import against_usual, savings
from scaling_perception.interop.find import SHIPPED
from scaling_perception.report import BASELINE_NAMES, verdicts
from scaling_perception.report import MAIN_METRIC as ALL_METRICS

PAGE = ROOT / "docs" / "results.md"
TOLERANCE = 0.003
NUMBER = re.compile(r"[-+−]?\d+(?:\.\d+)?")
SHIPPED_TASKS = json.loads((SHIPPED / "mini-scenes" / "config.json").read_text())["tasks"]  # what the page is about
MAIN_METRIC = {task: ALL_METRICS[task] for task in SHIPPED_TASKS}
BY_LABEL = {label: task for task, (_, label, _) in MAIN_METRIC.items()}


def section(heading):
    """The text below a heading, up to the next of the same kind."""
    text = PAGE.read_text(encoding="utf-8")
    level = re.match("#+", heading)[0]
    return re.search(rf"^{re.escape(heading)}.*?\n(.*?)(?=^{level}? |^#{{1,{len(level)}}} |\Z)", text, re.M | re.S)[1]


def tables(text):
    """Every table of a text as a list of rows {column: cell}."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
        head, _, *rows = [[cell.strip() for cell in row.strip("|\n ").split(" | ")] for row in block.splitlines()]
        found.append([dict(zip(head, row, strict=True)) for row in rows])
    return found


def command(task, heading):
    """The words of the page's evaluation of a task, which writes into ``heading``'s folder."""
    for line in lines(PAGE):
        words = line.replace("$t", task).split(" ")
        if f"runs/{heading}/{task}.json" in words and f"--task {task}" in " ".join(words):
            return words[1:]
    raise AssertionError(f"no command of {heading} for {task}")


def measured(words, folder):
    path = folder / "result.json"
    words = [*words[: words.index("--json")], "--json", str(path), *words[words.index("--json") + 2 :]]
    assert main(words) == 0
    return json.loads(path.read_text(encoding="utf-8"))


def numbers(text):
    return [float(word.replace("−", "-")) for word in NUMBER.findall(text.replace("n < 5", ""))]


def same(shown, summary, where):
    """A figure of the page, «0.249 [0.215, 0.287]» or «0.182 [n < 5]», against what was measured now."""
    wanted = [summary["mean"], *(summary["ci95"] or ())]
    found = numbers(shown)
    assert len(found) == len(wanted), f"{where}: {shown}, measured {wanted}"
    digits = len(re.search(r"\.(\d+)", shown)[1])
    for one, other in zip(found, wanted, strict=True):
        assert abs(one - other) <= TOLERANCE * (1 + abs(other)) + 0.5 * 10**-digits, (
            f"{where}: {shown}, measured {wanted}"
        )


def test_the_page_is_read_as_it_is_written():
    grid, trivial = tables(section("### depth: AbsRel"))
    assert len(grid) == 18 and grid[0]["preset"] == "paper" and "AbsRel, N = 20" in grid[0]
    assert {row["trivial answers and floor"] for row in trivial} <= set(BASELINE_NAMES.values())
    assert numbers("AbsRel −0.3099 [-0.35, +0.26]") == [-0.3099, -0.35, 0.26]
    assert [len(table) for table in tables(section("## Real samples"))] == [10]
    for task in MAIN_METRIC:
        assert command(task, "compute")[:3] == ["evaluate", "--task", task] == command(task, "adaptive")[:3]
    with pytest.raises(AssertionError, match="measured"):
        same("0.249 [0.215, 0.287]", {"mean": 0.249, "ci95": [0.215, 0.292]}, "")
    same("0.249 [0.215, 0.287]", {"mean": 0.2512, "ci95": [0.2141, 0.2893]}, "")
    with pytest.raises(AssertionError, match="measured"):
        same("0.182 [0.182, 0.182]", {"mean": 0.182, "ci95": None}, "")


@pytest.mark.slow
@pytest.mark.parametrize("task", MAIN_METRIC)
def test_test_time_compute(task, tmp_path):
    metric, label, _ = MAIN_METRIC[task]
    result, text = measured(command(task, "compute"), tmp_path), section(f"### {task}: {label}")
    grid, trivial = tables(text)
    cells = {(c["preset"], c["steps"], c["ensemble"]): c for c in result["cells"]}
    for row in grid:
        for column, shown in row.items():
            if size := re.search(r"N = (\d+)$", column):
                key = (row["preset"], int(row["steps"]), int(size[1]))
                if column.startswith("GMAC"):
                    assert abs(float(shown) - cells[key]["macs"] / 1e9) <= 0.006, key
                else:
                    same(shown, cells[key]["metrics"][metric], f"{task} {key}")
    names = {words: name for name, words in BASELINE_NAMES.items()}
    for row in trivial:
        name = names[row["trivial answers and floor"]]
        same(row[label], result["baselines"][name]["metrics"][metric], f"{task} {name}")
    now = {line.split(label)[0]: line for line in verdicts(result)}
    for line in re.findall(r"^- (.*)$", text, re.M):
        other = next(now[start] for start in now if start.split(" (")[0] == line.split(label)[0].split(" (")[0])
        for one, two in zip(numbers(line.split(label, 1)[1]), numbers(other.split(label, 1)[1]), strict=True):
            assert abs(one - two) <= TOLERANCE * (1 + abs(two)), f"{line}\nmeasured: {other}"


@pytest.mark.slow
@pytest.mark.parametrize("task", MAIN_METRIC)
def test_compute_by_image(task, tmp_path):
    metric, label, _ = MAIN_METRIC[task]
    result = measured(command(task, "adaptive"), tmp_path)
    rows = [row for row in tables(section("## Compute by image"))[0] if row["what"].startswith(f"{task}, ")]
    assert rows
    most = max(cell["steps"] for cell in result["cells"])
    whole = max(cell["macs"] for cell in result["cells"] if cell["kind"] == "constant" and cell["steps"] == most)
    for row in rows:
        kind = "tolerance" if "within" in row["what"] else "step_tolerance"
        (limit,) = numbers(row["what"])
        (cell,) = (c for c in result["cells"] if c.get(kind) == limit and c["steps"] == most and c["ensemble"] == 20)
        assert abs(numbers(row["members"])[0] - cell["mean_members"]) <= 0.5, row
        assert abs(numbers(row["steps"])[0] - cell["mean_steps"]) <= 0.3, row
        assert abs(numbers(row["compute"])[0] - 100 * cell["macs"] / whole) <= 3, row
        same(row["error"].removeprefix(label), {**cell["metrics"][metric], "ci95": None}, str(row))


@pytest.mark.slow
@pytest.mark.parametrize("task", MAIN_METRIC)
def test_merged_as_latents(task, tmp_path):
    metric, label, _ = MAIN_METRIC[task]
    result = measured(command(task, "latents"), tmp_path)
    rows = tables(section("## Members merged as latents").split(f"\n{task}, {label}:\n")[1])[0]
    found = {(one.cell["steps"], one.cell["ensemble"]): one for one in against_usual(result["cells"], metric)}
    assert len(rows) == len(found) == 9
    for row in rows:
        one = found[int(row["steps"]), int(row["N"])]
        same(row["latents"], {**one.cell["metrics"][metric], "ci95": None}, f"{task} {row}")
        same(row["difference"], {"mean": one.even.mean, "ci95": [one.even.low, one.even.high]}, f"{task} {row}")
        assert abs(float(row["GMAC of decoding, latents"]) - one.cell["decoder_macs"] / 1e9) <= 0.006, row


def change_of(shown):
    """A paired difference of the page, without its mark."""
    return re.sub(r" [+−]$", "", shown)


@pytest.mark.slow
@pytest.mark.parametrize("task", MAIN_METRIC)
def test_verifiers(task, tmp_path):
    metric, label, _ = MAIN_METRIC[task]
    chosen, allocated = tables(section("## Verifiers without ground truth"))
    result = measured(command(task, "chosen"), tmp_path)
    found = {
        (one.cell["verifier"], one.cell["verify"], f"N = {one.cell['ensemble']}"): one
        for one in against_usual(result["cells"], metric)
    }
    rows = [row for row in chosen if row["task"] == task and row["use"] != "usual merge"]
    assert 4 * len(rows) == len(found)
    for row in rows:
        for size in (name for name in row if name.startswith("N = ")):
            even = found[row["verifier"].strip("`"), row["use"], size].even
            assert (even is None) == (row[size] == "not measured"), row
            if even is not None:
                same(change_of(row[size]), {"mean": even.mean, "ci95": [even.low, even.high]}, f"{task} {row}")
    result = measured(command(task, "allocated"), tmp_path)
    for row in (row for row in allocated if row["task"] == task):
        (one,) = (
            s for s in savings(result["cells"], metric, "adaptive") if s.cell["tolerance"] == float(row["tolerance"])
        )
        assert abs(numbers(row["members"])[0] - one.cell["mean_members"]) <= 0.5, row
        same(row["error"].removeprefix(label.split()[0]), {**one.cell["metrics"][metric], "ci95": None}, str(row))
        even = {"mean": one.even.mean, "ci95": [one.even.low, one.even.high]}
        same(change_of(row["difference to the same compute for every image"]), even, str(row))


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.parametrize("row", tables(section("## Real samples"))[0], ids=lambda row: row["data"])
def test_real_samples(row, tmp_path, shared_dir):
    task, data = BY_LABEL[row["metric"]], row["data"]
    (line,) = (line for line in lines(PAGE) if "--dataset NAME" in line)
    line = line.replace("TASK", task).replace("--dataset NAME", f"--dataset {data}")
    words = line.replace("DIR", os.path.join(shared_dir, "data", data)).split(" ")[1:]
    result, metric = measured(words, tmp_path), MAIN_METRIC[task][0]
    assert result["images"] == int(row["images"])
    same(row["mini"], result["cells"][0]["metrics"][metric], f"{data} mini")
    shown, name = re.fullmatch(r"(.*?\]) \((.*)\)", row["strongest trivial answer"]).groups()
    names = {words: key for key, words in BASELINE_NAMES.items()}
    same(shown, result["baselines"][names[name]]["metrics"][metric], f"{data} {name}")
    same(row["autoencoder floor"], result["baselines"]["autoencoder"]["metrics"][metric], f"{data} floor")
