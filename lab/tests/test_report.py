"""`renorm report`: run folders as a page, beside the papers' claims."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import statistics
from base64 import b64decode
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from scipy.stats import ttest_ind, ttest_rel

from renorm_lab.cli import main
from renorm_lab.data import load_dataset
from renorm_lab.errors import LabError
from renorm_lab.recipes import RECIPES
from renorm_lab.recipes.decay import WeightDecay
from renorm_lab.recipes.noniid_classes import NonIidClasses
from renorm_lab.report.claims import CLAIMS, NUMBERS
from renorm_lab.report.compare import Verdict, beside, compare, judge
from renorm_lab.report.documents import renewed
from renorm_lab.report.folders import Folder, read_folder
from renorm_lab.report.intervals import Difference, difference
from renorm_lab.report.kinds import Claim
from renorm_lab.report.page import report
from renorm_lab.report.tables import tally
from renorm_lab.runs import Result, Run

from .conftest import at_scale

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "results").exists(), reason="an sdist holds no results")
COMMITTED = (
    "noniid-digits", "noniid-digits-lr0.02", "microbatch-digits", "noniid-cifar100", "microbatch-cifar100",
    "noniid-classes-cifar100", "smallbatch-cifar100", "weigh-cifar100", "ghost-cifar100", "decay-cifar100",
    "noniid-cifar100-16", "smallbatch-cifar100-16", "allfour-cifar100", "metric-omniglot",
    "metric-omniglot-close", "combination-cifar100", "workers-digits", "workers-digits-resnet8", "workers-fashion",
    "workers-fashion-steps3200", "workers-fashion-steps12800", "workers-digits-steps2400", "workers-digits-steps9600",
    "workers-cifar20",
    "microbatch-cifar20", "noniid-classes-cifar20", "finetune-cifar100",
    "finetune-cifar100-no-decay", "finetune-regression-cifar100", "tiles-digits", "tiles-digits-long",
)  # fmt: skip

RUN = {
    "recipe": "noniid", "data": "digits", "model": "mlp", "regime": "i.i.d.", "method": "batch norm", "tracking": "var",
    "limits": False, "examples_per_group": None, "channels_per_group": 1, "classes_per_batch": None,
    "examples_per_class": None, "batch_size": 32, "forward_size": None, "steps": 1000, "lr": 0.05, "momentum": 0.05,
    "augment": False, "seed": 0,
}  # fmt: skip
RESULT = {
    "alpha": 0.1, "validation_accuracy_off": 0.5, "validation_accuracy_on": 0.6, "test_accuracy_off": 0.5,
    "test_accuracy_on": 0.6, "test_loss_off": 1.5, "test_loss_on": 1.25, "seconds": 2.5,
}  # fmt: skip
TABLE_1 = {
    "recipe": "noniid-classes", "data": "cifar100", "model": "resnet18", "regime": "4 classes x 32", "batch_size": 128,
    "classes_per_batch": 4, "examples_per_class": 32, "replacement": True, "steps": 18_750,
}  # fmt: skip


def write_folder(path: Path, rows: list[dict], *, settings: str = '{"recipe": "noniid"}') -> Path:
    path.mkdir()
    full = [RUN | RESULT | {"torch": "2.13.0"} | row for row in rows]
    names = list(dict.fromkeys(name for row in full for name in row))
    for file, columns, lines in (
        ("results.csv", names, full),
        ("curves.csv", ["regime", "method", "seed", "step", "train_loss", "validation_accuracy"],
         [{name: row[name] for name in ("regime", "method", "seed")}
          | {"step": step, "train_loss": 1.0, "validation_accuracy": 0.5} for row in full for step in (500, 1000)]),
    ):  # fmt: skip
        with (path / file).open("w", newline="") as opened:
            writer = csv.DictWriter(opened, columns)
            writer.writeheader()
            writer.writerows(lines)
    (path / "settings.json").write_text(settings)
    (path / "command.txt").write_text("renorm run noniid\n")
    return path


def seeds(accuracies: list[float], **row: object) -> list[dict]:
    return [row | {"seed": seed, "test_accuracy_off": value, "test_accuracy_on": value}
            for seed, value in enumerate(accuracies)]  # fmt: skip


class Page(HTMLParser):
    """What a browser would fetch, and what a reader who sees no picture gets."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.ids: set[str | None] = set()
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.tags.append(tag)
        self.ids.add(found.get("id"))
        self.links += [found[name] or "" for name in ("src", "href") if name in found]
        if tag == "img":
            self.images.append(found)


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report on the results in the repository."""
    out = tmp_path_factory.mktemp("report")
    report([ROOT / "results" / name for name in COMMITTED], out)
    return out


def test_page_needs_nothing_from_elsewhere_and_every_picture_has_words(committed: Path):
    text = (committed / "report.html").read_text()
    page = Page(text)
    assert all(link.startswith(("#", "data:image/svg+xml;base64,")) for link in page.links)
    assert {link[1:] for link in page.links if link.startswith("#")} <= page.ids
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "url(" not in text
    assert "@import" not in text
    files = [ROOT / "results" / name / "results.csv" for name in COMMITTED]
    regimes = {(file, row["regime"]) for file in files for row in csv.DictReader(file.read_text().splitlines())}
    assert len(page.images) == 2 * len(regimes)
    for image in page.images:
        assert len(image["alt"] or "") > 60
        picture = ElementTree.fromstring(b64decode((image["src"] or "").partition(",")[2]))
        assert picture.tag == "{http://www.w3.org/2000/svg}svg"


def test_page_knows_telephones_and_the_dark(committed: Path):
    text = (committed / "report.html").read_text()
    assert 'name="viewport" content="width=device-width' in text
    assert "@media (prefers-color-scheme: dark)" in text
    assert "@media (max-width:" in text


def test_tables_hold_mean_and_deviation_of_the_seeds(committed: Path):
    with (ROOT / "results/noniid-digits/results.csv").open() as file:
        accuracies = [100 * float(row["test_accuracy_on"]) for row in csv.DictReader(file)
                      if (row["method"], row["regime"]) == ("ghost batch norm, n = 8", "2 classes x 16")]  # fmt: skip
    cell = f"{statistics.mean(accuracies):.1f} ± {statistics.stdev(accuracies):.1f}"
    line = r"ghost batch norm, n = 8 \| 2 classes x 16 \| weighing on \| (.+?) \| 3 \| 72.0 \| P2 table 1 \| different"
    found = re.findall(line, (committed / "report.md").read_text())
    assert found[0] == cell
    assert f'<td data-name="ours">{cell}</td>' in (committed / "report.html").read_text()


def test_same_folder_gives_the_same_report(tmp_path: Path):
    for out in ("first", "second"):
        report([ROOT / "results/microbatch-cifar100"], tmp_path / out)
    for name in ("report.html", "report.md"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_every_claim_is_named_even_if_nothing_tests_it(committed: Path):
    for name in ("report.html", "report.md"):
        text = (committed / name).read_text().replace("&#39;", "'")
        assert all(claim.text in text for claim in CLAIMS)
        assert "not tested" in text


@pytest.mark.parametrize(("kind", "equal_variances"), [("welch", False), ("paired", None)])
def test_interval_is_students(kind: str, equal_variances: bool | None):
    first, second = [78.0, 79.5, 76.0, 80.1], [75.0, 76.1, 75.5, 71.0]
    test = ttest_rel(first, second) if kind == "paired" else ttest_ind(first, second, equal_var=equal_variances)
    found = difference(first, second, paired=kind == "paired")
    assert (found.low, found.high) == pytest.approx(tuple(test.confidence_interval(0.95)))
    assert found.mean == pytest.approx(statistics.mean(first) - statistics.mean(second))


def test_one_seed_has_no_interval_and_equal_seeds_one_of_a_point():
    assert difference([50.0], [40.0], paired=False) == Difference(10.0, -math.inf, math.inf, 1)
    assert difference([50.0, 50.0], [40.0, 40.0], paired=False) == Difference(10.0, 10.0, 10.0, 2)


@pytest.mark.parametrize(
    ("level", "low", "high", "seeds", "verdict"),
    [
        (False, 0.1, 5.0, 3, Verdict.CONFIRMED),
        (False, -0.1, 5.0, 3, Verdict.OPEN),
        (False, -5.0, -0.1, 3, Verdict.OPPOSITE),
        (False, -math.inf, math.inf, 1, Verdict.ONE_SEED),
        (True, -0.9, 0.9, 3, Verdict.CONFIRMED),
        (True, 0.2, 0.9, 3, Verdict.CONFIRMED),
        (True, -1.1, 0.9, 3, Verdict.OPEN),
        (True, 1.1, 3.0, 3, Verdict.OPPOSITE),
        (True, -3.0, -1.1, 3, Verdict.OPPOSITE),
        (True, -math.inf, math.inf, 1, Verdict.ONE_SEED),
    ],
)
def test_verdict_follows_from_the_interval(level: bool, low: float, high: float, seeds: int, verdict: Verdict):
    claim = next(claim for claim in CLAIMS if claim.level == level)
    assert judge(claim, Difference((low + high) / 2 if seeds > 1 else 2.0, low, high, seeds)) == verdict


def claim_of(text: str) -> Claim:
    return next(claim for claim in CLAIMS if claim.text == text)


def test_in_the_papers_setting_sizes_and_accuracies_are_compared(tmp_path: Path):
    rows = [
        *seeds([0.401, 0.411, 0.391], method="batch norm", **TABLE_1),
        *seeds([0.60, 0.61, 0.59], method="batch renorm", limits=True, tracking="std", **TABLE_1),
    ]
    folder = read_folder(write_folder(tmp_path / "table-1", rows))
    claim = claim_of("With few classes batch renorm is better than batch norm")
    (found,) = (comparison for comparison in compare(folder) if comparison.claim == claim)
    assert found.verdict == Verdict.CONFIRMED
    assert found.difference.mean == pytest.approx(19.9)
    by_spot = {(pair.run.method, pair.spot.weighed): pair for pair in beside(folder)}
    assert by_spot["batch norm", False].elsewhere == ()
    assert by_spot["batch renorm", False].theirs == 69.0
    report([folder.path], tmp_path / "out")
    text = (tmp_path / "out/report.md").read_text()
    assert "| batch renorm | 4 classes x 32 | weighing off | 60.0 ± 1.0 | 3 | 69.0 | P2 table 1 | -9.0 |" in text
    assert "- P2 table 1, batch renorm, 4 classes x 32, weighing off: 60.0 ± 1.0 instead of 69.0, -9.0 points" in text
    assert "batch norm, 4 classes x 32, weighing off: 40.1" not in text  # as in the paper


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        ({"data": "data/cifar100.npz"}, "data data/cifar100.npz (paper: cifar100)"),
        ({"batch_size": 64}, "batch size 64 (paper: 128)"),
        ({"classes_per_batch": 8}, "classes per batch 8 (paper: 4)"),
        ({"steps": 100}, "steps 100 (paper: 15,000 or more)"),
    ],
)
def test_other_settings_are_named_and_their_accuracies_not_compared(tmp_path: Path, change: dict, phrase: str):
    rows = seeds([0.2, 0.3, 0.4], method="batch norm", **TABLE_1 | change)
    folder = read_folder(write_folder(tmp_path / "other", rows))
    assert {pair.elsewhere for pair in beside(folder)} == {(phrase,)}
    report([folder.path], tmp_path / "out")
    text = (tmp_path / "out/report.md").read_text()
    assert phrase in text
    assert "| 40.1 | P2 table 1 | different setting |" in text


def test_closer_limits_do_not_stand_for_the_paper_s(tmp_path: Path):
    closer = {"method": "batch renorm, r to 1.5, d to 0.5", "limits": True, "r_max": 1.5, "d_max": 0.5}
    plain = {"method": "batch norm", "r_max": 3.0, "d_max": 5.0}
    rows = [row for change in (plain, closer) for row in seeds([0.4, 0.41, 0.42], **TABLE_1 | change)]
    folder = read_folder(write_folder(tmp_path / "closer", rows))
    assert {pair.run.method for pair in beside(folder)} == {"batch norm"}
    assert not any("batch renorm" in comparison.claim.text for comparison in compare(folder))


def test_results_against_the_paper_are_listed(tmp_path: Path):
    rows = [
        *seeds([0.8, 0.81, 0.82], method="batch norm", recipe="microbatch", regime="n = 4", examples_per_group=4),
        *seeds([0.7, 0.71, 0.72], method="batch renorm", recipe="microbatch", regime="n = 4", examples_per_group=4),
    ]
    report([write_folder(tmp_path / "worse", rows)], tmp_path / "out")
    text = (tmp_path / "out/report.md").read_text()
    where, _, rest = text.partition("## The claims")
    assert "better than batch norm (P1 4.2, +2.3): here -10.0 (interval -12.3 to -7.7, seeds: 3)" in where
    assert "not confirmed: the opposite" in where
    assert "not confirmed: the opposite: worse n = 4 (-10.0)" in rest


def test_example_weighing_is_compared_on_the_same_networks(tmp_path: Path):
    rows = [
        TABLE_1 | {"seed": seed, "test_accuracy_off": off, "test_accuracy_on": off + gain}
        for seed, (off, gain) in enumerate([(0.2, 0.01), (0.4, 0.012), (0.6, 0.011)])
    ]
    folder = read_folder(write_folder(tmp_path / "weighed", rows))
    claim = claim_of("With few classes example weighing helps batch norm")
    (found,) = (comparison for comparison in compare(folder) if comparison.claim == claim)
    assert found.verdict == Verdict.CONFIRMED  # the spread between networks is a hundred times the gain's
    assert found.difference.high < 2


def test_every_claim_is_tested_and_every_number_met_by_a_recipe(tmp_path: Path):
    measures = {"training mode": "training-mode test accuracy, 25 classes x 2",
                "estimates": "test accuracy, statistics of training images, not augmented"}  # fmt: skip
    digits = load_dataset("digits", tmp_path, 32)
    tested: set[str] = set()
    met: set[float] = set()
    recipes = [at_scale(recipe, "paper") for recipe in RECIPES.values()]
    for recipe in [*recipes, NonIidClasses(independent=True), WeightDecay()]:
        results = {}
        for run in recipe.runs(digits):
            measured = tuple((measures[name], 0.5) for name in run.measures.split("+") if name in measures)
            results[run] = Result(**RESULT, curve=(), measures=measured)
        folder = Folder(tmp_path / recipe.name, {}, "", {}, results)
        tested |= {comparison.claim.text for comparison in compare(folder)}
        met |= {pair.theirs for pair in beside(folder) if not pair.elsewhere}
    assert tested == {claim.text for claim in CLAIMS}
    assert met == {number for numbers in NUMBERS for number in numbers.accuracies.values()}


def test_other_measures_have_a_table_and_can_test_a_claim(tmp_path: Path):
    rows = seeds([0.5, 0.5, 0.5], regime="2 classes x 16", classes_per_batch=2)
    folder = write_folder(tmp_path / "measured", rows)
    lines = ["regime,method,seed,measure,value"] + [
        f'2 classes x 16,batch norm,{seed},"training-mode test accuracy, 25 classes x 2",{value}'
        for seed, value in enumerate([0.75, 0.76, 0.77])
    ]
    (folder / "measures.csv").write_text("\n".join(lines) + "\n")
    claim = claim_of("Batch norm trained on few classes is better evaluated in training mode")
    (found,) = (comparison for comparison in compare(read_folder(folder)) if comparison.claim == claim)
    assert found.difference.mean == pytest.approx(26)
    assert found.verdict == Verdict.CONFIRMED
    report([folder], tmp_path / "out")
    text = (tmp_path / "out/report.md").read_text()
    assert "| measure | batch norm, 2 classes x 16 |\n" in text
    assert "| training-mode test accuracy, 25 classes x 2 | 0.76 ± 0.01 |\n" in text


def test_unfinished_folder_says_what_is_missing(tmp_path: Path):
    rows = [*seeds([0.5, 0.6], method="batch norm"), *seeds([0.7], method="batch renorm"),
            *seeds([0.4], method="batch norm", regime="2 classes x 16", classes_per_batch=2)]  # fmt: skip
    report([write_folder(tmp_path / "half", rows)], tmp_path / "out")
    text = (tmp_path / "out/report.md").read_text()
    assert "| batch renorm | 70.0 | 70.0 | - | - |" in text
    assert "over 1 to 2 seeds" in text


def test_seeds_without_a_curve_are_left_out_of_pictures(tmp_path: Path):
    folder = write_folder(tmp_path / "gaps", seeds([0.5, 0.6]))
    lines = (folder / "curves.csv").read_text().splitlines(keepends=True)
    (folder / "curves.csv").write_text("".join(line for line in lines if ",0," not in line))
    report([folder], tmp_path / "out")
    page = Page((tmp_path / "out/report.html").read_text())
    assert "batch norm 50.0 halfway, 50.0 at the end" in (page.images[1]["alt"] or "")


def test_names_are_no_markup(tmp_path: Path):
    rows = seeds([0.5], method="<b>bold</b>", regime="a | b", data="x<script>")
    report([write_folder(tmp_path / "odd", rows)], tmp_path / "out")
    page = (tmp_path / "out/report.html").read_text()
    assert "<b>" not in page
    assert "<script>" not in page
    assert "&lt;b&gt;bold" in page
    assert "a \\| b, off" in (tmp_path / "out/report.md").read_text()


def test_settings_are_read_from_yaml_or_json(tmp_path: Path):
    folder = write_folder(tmp_path / "folder", seeds([0.5]), settings=json.dumps({"steps": 17}))
    assert read_folder(folder).settings == {"steps": 17}
    (folder / "settings.json").unlink()
    (folder / "config.yaml").write_text("recipe: noniid\nlr: 0.05\n")
    assert read_folder(folder).settings == {"recipe": "noniid", "lr": 0.05}


def test_files_of_older_versions_are_read():
    run = read_folder(ROOT / "results/noniid-cifar100").first  # written before runs had a size of a forward
    assert run.forward_size is None
    assert (run.limits, run.steps, run.lr) == (False, 3000, 0.05)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "there is no such folder"),
        (lambda folder: (folder / "results.csv").unlink(), "holds no results.csv"),
        (lambda folder: cut(folder / "results.csv", lines=1), "no run is finished"),
        (lambda folder: cut(folder / "results.csv", characters=30), "its lines are not equally long"),
        (lambda folder: change(folder / "results.csv", ",0.5,0.6,", ",half,0.6,"), "damaged, or of another version"),
        (lambda folder: change(folder / "results.csv", ",0.5,0.6,", ",1.5,0.6,"), "validation_accuracy_off = 1.5"),
        (lambda folder: change(folder / "results.csv", ",0.5,0.6,", ",nan,0.6,"), "validation_accuracy_off = nan"),
        (lambda folder: change(folder / "results.csv", "test_loss_on", "loss"), "damaged, or of another version"),
        (lambda folder: change(folder / "results.csv", ",1,0.1,", ",0,0.1,"), "a run stands there twice"),
        (lambda folder: (folder / "results.csv").write_bytes(b"\xff\xfe\x00"), "cannot be read"),
        (lambda folder: change(folder / "curves.csv", ",500,", ",soon,"), "curves.csv: damaged"),
        (lambda folder: (folder / "measures.csv").write_text("regime,measure\na,b\n"), "measures.csv: damaged"),
        (lambda folder: (folder / "settings.json").write_text("{"), "settings.json: damaged"),
        (lambda folder: (folder / "settings.json").write_text("[1]"), "must hold options by name"),
        (lambda folder: (folder / "config.yaml").write_text("a: [1"), "config.yaml: damaged"),
    ],
)  # fmt: skip
def test_what_is_damaged_is_named_in_a_line(tmp_path: Path, damage, message: str):
    folder = write_folder(tmp_path / "folder", seeds([0.5, 0.5]))
    damage(folder)
    with pytest.raises(LabError, match=re.escape(message)) as raised:
        report([folder], tmp_path / "out")
    assert str(raised.value).startswith(str(folder))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def cut(path: Path, lines: int | None = None, characters: int = 0) -> None:
    text = path.read_text()
    path.write_text("".join(text.splitlines(keepends=True)[:lines]) if lines else text[:-characters])


def change(path: Path, before: str, after: str) -> None:
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))


def test_folders_of_one_name_and_places_that_cannot_be_written_are_refused(tmp_path: Path):
    folder = write_folder(tmp_path / "folder", seeds([0.5]))
    with pytest.raises(LabError, match="different names, got folder twice"):
        report([folder, folder], tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(LabError, match="cannot be written"):
        report([folder], tmp_path / "file")


def test_claims_name_fields_of_runs_and_numbers_of_papers():
    known = {field.name for field in fields(Run)}
    for setting in [claim.setting for claim in CLAIMS] + [numbers.setting for numbers in NUMBERS]:
        assert setting.run.keys() | setting.few_classes.keys() <= known
    assert all(claim.level or claim.difference is None or claim.difference > 0 for claim in CLAIMS)
    assert {field.name for field in fields(Result)} >= RESULT.keys()


def test_tables_of_the_results_page_are_those_of_the_committed_files():
    page = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    for name in COMMITTED:
        assert f"<!-- table {name} -->" in page
    assert renewed(page, ROOT / "results") == page, "run: python -m renorm_lab.report.documents docs/results.md"


def test_tables_between_markers_follow_the_files(tmp_path: Path):
    folder = write_folder(tmp_path / "folder", seeds([0.5, 0.75]))
    page = "above 1.0\n\n<!-- table folder -->\nformer\n<!-- end -->\n\n<!-- claims folder -->\n<!-- end -->\nbelow\n"
    text = renewed(page, tmp_path)
    assert "| batch norm | 62.5 ± 17.7 | 62.5 ± 17.7 |\n<!-- end -->\n" in text
    assert "former" not in text
    assert text.startswith("above 1.0\n\n<!-- table")
    assert text.endswith("<!-- end -->\nbelow\n")
    assert renewed(text, tmp_path) == text
    shutil.rmtree(folder)
    with pytest.raises(LabError, match="there is no such folder"):
        renewed(text, tmp_path)


def test_losses_are_to_the_best_method_of_each_regime_and_the_safest_comes_first(tmp_path: Path):
    accuracies = {("batch norm", "i.i.d."): 0.5, ("batch norm", "few"): 0.2, ("batch renorm", "i.i.d."): 0.45,
                  ("batch renorm", "few"): 0.4, ("group norm", "few"): 0.43}  # fmt: skip
    rows = [row for (method, regime), value in accuracies.items()
            for row in seeds([value - 0.01, value + 0.01], method=method, regime=regime)]  # fmt: skip
    write_folder(tmp_path / "folder", rows)
    text = renewed("<!-- losses folder -->\n<!-- end -->\n", tmp_path)
    assert text.splitlines()[1:-1] == [
        "| method | i.i.d. | few | mean | largest |", "| --- | ---: | ---: | ---: | ---: |",
        "| batch renorm | 5.0 | 3.0 | 4.0 | 5.0 |", "| batch norm | 0.0 | 23.0 | 11.5 | 23.0 |",
        "| group norm | - | 0.0 | - | - |",
    ]  # fmt: skip
    report([tmp_path / "folder"], tmp_path / "report")
    for name in ("report.html", "report.md"):
        assert "What each method loses" in (tmp_path / "report" / name).read_text()


def test_the_tally_can_be_read_without_the_tables(tmp_path: Path):
    folders = [read_folder(ROOT / "results" / name) for name in ("microbatch-cifar100", "noniid-cifar100")]
    sentence = tally([comparison for folder in folders for comparison in compare(folder)])
    said = re.fullmatch(r"(\d+) of the papers' \d+ claims are tested here, by (\d+) comparisons: (.*)\.", sentence)
    assert said is not None
    assert int(said[1]) < int(said[2])
    outcomes = said[3].split("; ")
    assert sum(int(outcome.partition(" ")[0]) for outcome in outcomes) == int(said[2])
    assert any(outcome.endswith("undecided, as one seed is not enough to tell") for outcome in outcomes)
    assert tally([]).startswith("None of the papers' ")


def test_shares_measured_besides_stand_in_a_table_of_their_own(tmp_path: Path):
    rows = [row for regime in ("few", "many") for row in seeds([0.5, 0.6], method="batch norm", regime=regime)]
    folder = write_folder(tmp_path / "folder", rows)
    measured = {"test accuracy, last weights": 0.5, "test accuracy, buffers copied": 0.25}
    lines = [f'{regime},batch norm,{seed},"{name}",{value + 0.1 * seed}' for regime in ("few", "many")
             for seed in (0, 1) for name, value in measured.items()]  # fmt: skip
    (folder / "measures.csv").write_text("\n".join(["regime,method,seed,measure,value", *lines]) + "\n")
    text = renewed("<!-- measures folder: few -->\n<!-- end -->\n", tmp_path)
    assert text.splitlines()[1:-1] == [
        "| method | last weights | buffers copied |", "| --- | ---: | ---: |",
        "| batch norm | 55.0 ± 7.1 | 30.0 ± 7.1 |",
    ]  # fmt: skip


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(ROOT / "results/microbatch-cifar100"), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").exists()
    assert main(["report", "nowhere"]) == 1
    assert capsys.readouterr().err == "renorm: error: nowhere: there is no such folder\n"
