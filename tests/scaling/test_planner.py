"""Plans against closed forms and brute force, their intervals, what they refuse, and the verb."""

import json
import math

import numpy as np
import pytest
from synthetic_laws import TRUTHS

from scaling_perception.cli import main
from scaling_perception.scaling.law_forms import make_form
from scaling_perception.scaling.laws import Law, write_law
from scaling_perception.scaling.plan_laws import Column, Laws, read_laws
from scaling_perception.scaling.plan_sizes import Size, Speed, bound, chip_named, seconds
from scaling_perception.scaling.planner import Question, plan
from scaling_perception.support import choosing
from scaling_perception.support.errors import UserError


def law_of(form, names, values=None, spread=0.01, draws=60, ranges=None, y="y", **more):
    """A law with known parameters, and parameter sets that scatter about them."""
    values = np.array(TRUTHS[form][0] if values is None else values, float)
    made = make_form(form, names)
    rng = np.random.default_rng(0)
    samples = values * np.exp(spread * rng.normal(size=(draws, len(values))))
    ranges = TRUTHS[form][1] if ranges is None else ranges
    ends = np.quantile(samples, [0.025, 0.975], axis=0).T
    parameters = {
        name: {"value": float(v), "interval": e.tolist(), "by": "bootstrap", "bootstrap": e.tolist(), "bca": None,
               "profile": None}
        for name, v, e in zip(made.published, values, ends, strict=True)
    }  # fmt: skip
    known = {"noise": {"log_sd": 0.01, "quantiles": [0.0] * 101}, "points": 100, "clusters": 100, "group": ()}
    known |= {"range": {n: list(map(float, r)) for n, r in zip(names, ranges, strict=True)}, "certificate": {}}
    known |= {"loss": {"kind": "huber"}, **more}
    return Law(form, made.equation, tuple(names), y, 0.95, parameters, samples, **known)


def laws_of(*laws, named=None, fixed=None, at=None):
    files = [f"law{i}.json" for i in range(len(laws))]
    return read_laws(laws, files, named or {}, fixed or {}, at or {})


CHINCHILLA = law_of("additive", ("params", "tokens"))


@pytest.mark.parametrize("budget", [1e19, 3e20, 1e22])
@pytest.mark.parametrize("truth", [TRUTHS["additive"][0], (1.8, 480.0, 0.35, 2000.0, 0.37)])
def test_params_and_tokens_have_the_closed_form_optimum(budget, truth):
    """min A / N^a + B / D^b with 6 N D = C FLOPs: N* = G (C / 6)^(b / (a + b)), G = (a A / (b B))^(1 / (a + b))."""
    _, a_, a, b_, b = truth
    product = budget / 6
    best = (a * a_ / (b * b_)) ** (1 / (a + b)) * product ** (b / (a + b))
    found = plan(laws_of(law_of("additive", ("params", "tokens"), truth)), Question(budget, "flops"))
    choice = found["choice"]
    assert choice["params"] == pytest.approx(best, rel=0.01)
    assert choice["tokens"] == pytest.approx(product / best, rel=0.01)
    assert choice["error"] == pytest.approx(truth[0] + a_ / best**a + b_ / (product / best) ** b, rel=1e-6)
    assert choice["cost"] == pytest.approx(budget)
    low, high = choice["intervals"]["params"]
    assert low < best < high
    # at the optimum a unit of compute is worth the same in both directions
    assert [row["change"] for row in found["worth"]] == pytest.approx([found["worth"][0]["change"]] * 2, rel=0.02)
    same = plan(laws_of(law_of("additive", ("params", "tokens"), truth)), Question(budget / 2, "macs"))
    assert same["choice"]["params"] == choice["params"]


def test_sizes_that_exist_are_as_brute_force_finds_them():
    sizes = [Size(f"{n:g}", n, n) for n in (3e7, 1e8, 3e8, 1e9)]
    e, a_, a, b_, b = TRUTHS["additive"][0]
    for budget in (1e18, 1e19, 1e20):
        errors = {s.name: e + a_ / s.params**a + b_ / (budget / 3 / s.params) ** b for s in sizes}
        found = plan(laws_of(CHINCHILLA), Question(budget, sizes=sizes))
        order = sorted(errors, key=lambda name: errors[name])
        assert (found["choice"]["size"], found["runner_up"]["size"]) == tuple(order[:2])
        assert found["choice"]["error"] == pytest.approx(errors[order[0]])
    assert sum(found["choice"]["intervals"]["size"].values()) == pytest.approx(1)


def test_training_and_serving_share_the_budget():
    """Brute force over sizes, steps and members: what serving leaves is trained with."""
    names, truth = ("steps", "ensemble", "params", "train_macs"), (*TRUTHS["test_time"][0], 5.0, 0.1)
    law = law_of("test_time", names, truth, ranges=((1, 200), (1, 50), (1e6, 1e9), (1e12, 1e17)))
    sizes = [Size(f"{n:g}", n, 256 * n, tokens=256) for n in (1e7, 1e8, 1e9)]
    steps, members, images, budget = (1, 5, 20, 100), (1, 2, 10), 1000, 1e16
    best = math.inf, None
    e, a, alpha, b, beta, g, gamma, h, eta = truth
    for s in sizes:
        for t in steps:
            for m in members:
                left = budget - images * 2 * s.macs * t * m
                if left > 0:
                    y = e + a / t**alpha + b / m**beta + g / s.params**gamma + h / (left / 3) ** eta
                    best = min(best, (y, (s.name, t, m)))
    question = Question(budget, images=images, passes=2, steps=steps, members=members, sizes=sizes)
    choice = plan(laws_of(law), question)["choice"]
    assert (choice["size"], choice["steps"], choice["members"]) == best[1] and choice["error"] == pytest.approx(best[0])
    assert choice["training_macs"] + choice["serving_macs"] == pytest.approx(budget)
    limit = {"macs": 2 * 256e7 * 5 * 2}
    choice = plan(laws_of(law), Question(**{**question.__dict__, "limits": limit}))["choice"]
    assert choice["macs_per_image"] <= limit["macs"]


def test_laws_of_training_and_of_steps_multiply():
    training = law_of("power_floor", ("train_macs",), (0.1, 150.0, 0.15), ranges=((1e12, 1e16),), y="abs_rel")
    steps = law_of(
        "test_time", ("steps", "members"), (0.2, 0.3, 0.8, 0.1, 1.0), ranges=((1, 100), (1, 20)), y="abs_rel"
    )
    both = laws_of(training, steps, at={"steps": 10.0, "members": 5.0})
    size = [Size("one", 1e7, 1e9)]
    choice = plan(both, Question(3e15, images=100, sizes=size))["choice"]

    def tested(t, m):
        return 0.2 + 0.3 / t**0.8 + 0.1 / m

    ratio = tested(choice["steps"], choice["members"]) / tested(10, 5)
    assert choice["error"] == pytest.approx((0.1 + 150 / choice["training"] ** 0.15) * ratio)
    for t, m in ((choice["steps"] * 2, choice["members"]), (choice["steps"], choice["members"] * 2)):
        left = 3e15 - 100e9 * t * m
        if left > 0 and t <= 100 and m <= 20:
            assert (0.1 + 150 / (left / 3) ** 0.15) * tested(t, m) / tested(10, 5) >= choice["error"]
    with pytest.raises(UserError, match="--at steps=1"):
        laws_of(training, steps)


def test_two_trainings_are_split_as_brute_force_splits_them():
    law = law_of("upcycling", ("d1", "d2"), spread=1e-3)
    e, a, a1, a2, a3 = TRUTHS["upcycling"][0]
    budget = 1e21
    found = plan(laws_of(law), Question(budget, item_macs=(1e9, 2e9)))["choice"]
    share = np.linspace(1e-3, 1 - 1e-3, 100_000)
    d1, d2 = budget / 3 * share / 1e9, budget / 3 * (1 - share) / 2e9
    y = e + a * d1**-a1 * d2 ** (-a2 + a3 * np.log(d1))
    assert found["error"] == pytest.approx(y.min(), rel=1e-4)
    assert found["first"] * 1e9 + found["second"] * 2e9 == pytest.approx(budget / 3, rel=0.06)


def test_a_law_of_compute_is_read_at_the_budget():
    found = plan(laws_of(law_of("power", ("train_macs",))), Question(3e12))
    assert found["choice"]["error"] == pytest.approx(28.93 * 1e12**-0.1504)
    assert found["choice"]["error_interval"][0] < found["choice"]["error"] < found["choice"]["error_interval"][1]
    assert found["worth"][0]["change"] == pytest.approx(1.1**-0.1504 - 1)
    assert found["runner_up"] is None
    before, after = found["next_run"]["before"], found["next_run"]["after"]
    assert 0 < after < before and found["next_run"]["macs"] <= 3e11
    flops = laws_of(law_of("power", ("flops",)))
    assert plan(flops, Question(6e12, "flops"))["choice"]["error"] == pytest.approx(28.93 * 2e12**-0.1504)


def test_intervals_hold_the_spread_of_the_parameter_sets():
    narrow, wide = (
        plan(laws_of(law_of("additive", ("params", "tokens"), spread=s)), Question(1e19)) for s in (1e-3, 0.03)
    )
    spans = [
        math.log(one["choice"]["intervals"]["params"][1] / one["choice"]["intervals"]["params"][0])
        for one in (narrow, wide)
    ]
    assert spans[1] > 10 * spans[0]
    assert narrow["runner_up"]["told_apart"]
    near = [Size("a", 2.0e8, 2.0e8), Size("b", 2.02e8, 2.02e8)]
    even = plan(laws_of(law_of("additive", ("params", "tokens"), spread=0.03)), Question(1e19, sizes=near))["runner_up"]
    assert not even["told_apart"] and even["excess"][0] < 0 < even["excess"][1]


def test_ties_go_to_the_cheaper():
    costs = {"cost": [3.0, 1.0, 2.0, 9.0], "seconds": [1.0, 1.0, 1.0, 1.0]}
    assert choosing.ranked([0.5, 0.5, 0.4, 0.1], costs, {"cost": 5.0}).tolist() == [2, 1, 0]
    assert choosing.ranked([0.5, math.nan], {"cost": [1, 1]}, {}).tolist() == [0]
    assert choosing.front([0.5, 0.4, 0.4, 0.3], {"macs": [1, 2, 2, 3], "seconds": [1, 9, 1, 1]}) == [0, 2, 3]


def test_speed_says_what_it_rests_on():
    from scaling_perception.models.presets import get_preset

    chip, dit = chip_named("h100"), get_preset("a4")
    size = Size("a4", math.nan, 80e9, 256, dit)
    for batch in (1, 64):
        least = bound(chip, dit, batch)
        weights = 2 * 300e6 / chip.bandwidth  # a4 has about 457 M parameters
        assert least > max(2 * 80e9 * batch / chip.flops * 0.9, weights)
    assert bound(chip, dit, 64, True) == pytest.approx(3 * bound(chip, dit, 64))
    told = {
        "measured, 25%": Speed(chip, measured=0.25), "assumed, 40%": Speed(chip), "roofline": Speed(chip, assumed=1.0),
        "measured seconds": Speed(per_mac=1e-12),
    }  # fmt: skip
    for text, speed in told.items():
        assert text in seconds(speed, size, 64)[1]
    assert seconds(Speed(chip, measured=0.25), size, 2)[0] == pytest.approx(4 * 80e9 / (0.25 * 989e12))
    assert seconds(Speed(per_mac=1e-12), size, 2)[0] == pytest.approx(0.16)


def _refusals():
    one = law_of("power", ("macs",), y="abs_rel", warnings=["all points are of one size (params 1e6): the law holds"])
    zero = law_of("additive", ("params", "tokens"))
    zero.parameters["alpha"]["interval"] = [0.0, 0.4]
    steps = law_of("test_time", ("steps", "members"), (0.2, 0.3, 0.8, 0.1, 1.0), ranges=((1, 100), (1, 20)))
    trained = law_of("test_time", ("steps", "train_macs"), (0.2, 0.3, 0.8, 0.1, 1.0), ranges=((1, 100), (1e9, 1e12)))
    size, sizes = [Size("a", 1e8, 1e8)], [Size("a", 1e8, 1e8), Size("b", 1e9, 1e9)]
    power = law_of("power", ("train_macs",))
    upcycled = law_of("upcycling", ("d1", "d2"))
    return {
        "one size only": (one, {}, "all points are of one size"),
        "no size in it": (power, {"sizes": sizes}, "no params: the size cannot be chosen"),
        "no members in it": (power, {"members": (1, 2)}, "no members"),
        "holds zero": (zero, {}, r"the interval of alpha, 0 to 0.4, holds zero"),
        "far beyond": (CHINCHILLA, {"budget": 1e31}, "decades outside the data"),
        "far below": (power, {"budget": 1e3}, "decades outside the data"),
        "what a step costs": (steps, {}, "give --sizes"),
        "images": (trained, {"sizes": size}, "give --images"),
        "served unknown": (power, {"sizes": size, "images": 10.0}, "give --steps"),
        "too dear": (steps, {"sizes": size, "budget": 10.0}, "buys nothing: the cheapest option takes 1e[+]08"),
        "served away": (trained, {"sizes": size, "budget": 1e6, "images": 10.0, "members": (1,)}, "buys nothing"),
        "limit": (steps, {"sizes": size, "limits": {"macs": 10.0}}, "cheapest prediction takes 1e[+]08 MACs"),
        "items": (upcycled, {}, "--item-macs"),
        "chip": (CHINCHILLA, {"unit": "chip-hours"}, "needs a chip"),
        "price": (CHINCHILLA, {"unit": "usd", "speed": Speed(chip_named("v6e"))}, "--price v6e="),
    }  # fmt: skip


@pytest.mark.parametrize("name", _refusals())
def test_what_a_law_does_not_support_is_refused_in_one_line(name):
    law, more, message = _refusals()[name]
    with pytest.raises(UserError, match=message) as error:
        plan(laws_of(law), Question(**{"budget": 1e19, **more}))
    assert "\n" not in str(error.value)


def test_columns_and_several_laws_are_refused_where_they_say_nothing():
    odd = law_of("power", ("temperature",))
    with pytest.raises(UserError, match="--column temperature=QUANTITY"):
        laws_of(odd)
    assert laws_of(odd, named={"temperature": "training"}).quantities == ("training",)
    with pytest.raises(UserError, match="neither training nor inference"):
        plan(laws_of(odd, fixed={"temperature": 2.0}), Question(1e12))
    with pytest.raises(UserError, match="did you mean 'training'"):
        laws_of(odd, named={"temperature": "trainin"})
    with pytest.raises(UserError, match="no law has this column"):
        laws_of(odd, named={"macs": "training"})
    with pytest.raises(UserError, match="laws of one error"):
        laws_of(law_of("power", ("macs",)), law_of("power", ("steps",), y="loss"))
    empty = law_of("power", ("macs",))
    empty.samples = empty.samples[:0]
    with pytest.raises(UserError, match="no bootstrapped"):
        laws_of(empty)
    twice = law_of("additive", ("params", "n"))
    with pytest.raises(UserError, match="two columns are 'params'"):
        laws_of(twice)


def test_a_warning_between_the_two_limits():
    found = plan(laws_of(law_of("power", ("train_macs",))), Question(3e16))
    assert any("2.0 decades outside" in text for text in found["warnings"])


# The verb


@pytest.fixture
def files(tmp_path):
    write_law(tmp_path / "two.json", CHINCHILLA)
    write_law(tmp_path / "serving.json", law_of("power", ("inference_macs",), y="abs_rel"))
    steps = law_of("test_time", ("steps", "ensemble"), (0.2, 0.3, 0.8, 0.1, 1.0), ranges=((1, 100), (1, 20)))
    write_law(tmp_path / "served.json", steps)
    (tmp_path / "other.json").write_text('{"kind": "plan"}')
    (tmp_path / "torn.json").write_text('{"kind": "scaling-law", "version": 1, "form": "power"}')
    (tmp_path / "text.json").write_text("hello")
    return tmp_path


def test_prints_a_table_and_writes_json(files, capsys):
    assert main(["plan", "--law", str(files / "two.json"), "--budget", "1e19", "--json", str(files / "plan.json")]) == 0
    text = capsys.readouterr().out
    for word in ("parameters", "training tokens", "runner-up", "worth", "next run", "tell them apart"):
        assert word in text
    written = json.loads((files / "plan.json").read_text())
    assert written["choice"]["params"] > 0 and written["kind"] == "plan"


def test_commands_of_a_choice(files, capsys):
    words = ["plan", "--law", str(files / "serving.json"), "--budget", "1e13", "--sizes", "a2", "--members", "5"]
    assert main([*words, "--model", "runs/x"]) == 0
    text = capsys.readouterr().out
    assert "scaling-perception evaluate --task depth --dataset hypersim --model runs/x --steps" in text
    assert "--ensemble 5" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--law two.json --budget nan", "finite number"),
        ("--law two.json --budget -1", "--budget"),
        ("--law two.json --budget 0", "--budget"),
        ("--law two.json --budget inf", "--budget"),
        ("--law two.json --budget 1e99", "decades outside"),
        ("--law two.json --budget 1e19 --unit flop", "did you mean 'flops'"),
        ("--law two.json --budget 1e3 --unit usd --chip h10", "did you mean 'h100'"),
        ("--law other.json --budget 1e19", "is no law"),
        ("--law torn.json --budget 1e19", "not a whole law"),
        ("--law text.json --budget 1e19", "not valid JSON"),
        ("--law none.json --budget 1e19", "none.json"),
        ("--law two.json --budget 1e19 --steps 1,x", "--steps 1,x"),
        ("--law two.json --budget 1e19 --column tokens", "--column tokens: give NAME=QUANTITY"),
        ("--law two.json --budget 1e19 --fix tokens=-1", "above zero"),
        ("--law two.json --budget 1e19 --measured-mfu 1.5", "up to 1"),
        ("--law two.json --budget 1e19 --seconds 1", "--seconds needs a speed"),
        ("--law two.json --budget 1e19 --seconds-per-image 3", "--seconds-per-image"),
        ("--law two.json --budget 1e19 --task depht", "did you mean 'depth'"),
        ("--law serving.json --budget 1e13 --sizes a9", "did you mean 'a"),
        ("--budget 1e13", "give --law"),
        ("--model mini --budget 1", "no setting for depth fits 1 MACs"),
        ("--law two.json --budget 1e19 --fix params=1e8", "--fix params: a plan chooses it: give --sizes"),
        ("--law two.json --budget 1e19 --fix tokens=1e10", "--fix tokens: a plan chooses it: give --samples"),
        ("--law served.json --budget 1e19 --fix steps=10", "--fix steps: a plan chooses it: give --steps"),
        ("--law served.json --budget 1e19 --fix ensemble=10", "--fix ensemble: a plan chooses it: give --members"),
        ("--law serving.json --budget 1e13 --column inference_macs=steps --fix inference_macs=3", "give --steps"),
        ("--law two.json --budget 1e19 --hold-out 1e9", "go together"),
        ("--law two.json --budget 1e19 --where task=depth", "--where is of no use with --law: leave it out"),
        (
            "--model mini --budget 5e10 --steps 3",
            "--steps 3: mini has no such measured setting for depth: choose among",
        ),
        ("--model mini --budget 5e10 --members 7,9", "--members 7,9: mini has no such measured setting"),
        ("--model mini --budget 5e10 --preset paper", "members 1, 2, 5, 10, preset fixed"),
        ("--model mini --budget 5e10 --fix a=1", "--fix is of no use with --model alone: leave it out"),
        ("--model mini --budget 5e10 --sizes a1", "--sizes is of no use"),
        ("--model mini --budget 5e10 --resolution 512", "--resolution is of no use"),
        ("--model mini --budget 5e10 --batch 4", "--batch is of no use"),
        ("--model mini --budget 5e10 --chip h100", "--chip is of no use"),
        ("--points two.json --hold-out 1e9 --steps 4", "--steps is of no use with --points: leave it out"),
    ],
)
def test_bad_input_is_one_line(files, words, message, capsys, monkeypatch):
    monkeypatch.chdir(files)
    assert main(["plan", *words.split()]) == 2
    caught = capsys.readouterr()
    assert message in caught.err and caught.err.count("\n") == 1 and caught.out == ""


def test_measured_budgets_are_chosen_as_predict_chooses(capsys):
    from scaling_perception.inference.budgets import choose, load_budgets
    from scaling_perception.interop.find import find_model

    found = choose(load_budgets(find_model("mini")), "depth", macs=5e9)
    assert main(["plan", "--model", "mini", "--budget", "5e9"]) == 0
    text = capsys.readouterr().out
    assert f"{found.steps} steps, {found.ensemble} members" in text
    assert f"--steps {found.steps} --ensemble {found.ensemble}" in text
    assert {"cache", "cache_interval", "views"} <= set(found.settings)
    for name in ("cache", "cache_interval", "views"):
        assert f"--{name.replace('_', '-')} {found.settings[name]}" in text, "all that the row decides"


@pytest.mark.parametrize(
    ("words", "starts"),
    [
        ("--steps 5", "choice    5 steps"),
        ("--steps 1,10 --members 1", "choice    1 steps, 1 members"),
        ("--preset fixed --members 2", "2 members"),
    ],
)
def test_measured_budgets_are_chosen_among_those_that_are_asked_for(words, starts, capsys):
    assert main(["plan", "--model", "mini", "--budget", "5e10", *words.split()]) == 0
    assert starts in capsys.readouterr().out.splitlines()[0]


def test_no_option_within_limits_is_no_warning(recwarn):
    columns = (Column("params", "fixed", value=1e8), Column("tokens", "tokens"))
    with pytest.raises(UserError, match="what a prediction costs is not known: give --sizes"):
        plan(Laws((CHINCHILLA,), (columns,), {}, ()), Question(1e19))
    assert not recwarn.list


def test_the_compute_of_a_training_that_was_done_can_be_fixed():
    law = law_of("test_time", ("steps", "train_macs"), (0.2, 0.3, 0.8, 0.1, 1.0), ranges=((1, 100), (1e9, 1e12)))
    question = Question(1e10, sizes=[Size("a", 1e8, 1e8)], members=(1,))
    assert plan(laws_of(law, fixed={"train_macs": 1e11}), question)["choice"]["steps"] == 100


def test_what_is_no_number_is_a_law_for_each(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names, ranges = ("steps", "ensemble"), ((1, 200), (1, 50))
    for name, a in (("fixed", 0.3), ("paper", 0.6)):
        law = law_of("test_time", names, (0.2, a, 0.8, 0.1, 1.0), ranges=ranges, y="abs_rel", spread=1e-3)
        write_law(f"{name}.json", law)
    words = ["plan", "--law", "fixed=fixed.json", "paper=paper.json", "--budget", "5e12", "--sizes", "a2"]
    assert main([*words, "--model", "runs/a2", "--json", "plan.json"]) == 0
    text = capsys.readouterr().out
    assert "fixed, before paper" in text and "--preset fixed" in text
    other = json.loads((tmp_path / "plan.json").read_text())["alternatives"][0]
    assert other["name"] == "paper" and other["told_apart"]
    assert main([*words, "--seconds", "1e-9", "--chip", "h100"]) == 2
    assert "fixed: no option is within the limits, at most 1e-09 seconds" in capsys.readouterr().err


def test_sizes_with_a_config_have_commands_and_memory(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ranges = ((1e15, 1e18), (1e14, 1e17))
    law = law_of("test_time", ("pretrain_macs", "finetune_macs"), (0.1, 100.0, 0.2, 40.0, 0.15), ranges=ranges)
    write_law("law.json", law)
    words = ["plan", "--law", "law.json", "--budget", "1e17", "--sizes", "nano", "--resolution", "64", "--chip", "v5e"]
    assert main([*words, "--json", "plan.json"]) == 0
    plan_, text = json.loads((tmp_path / "plan.json").read_text()), capsys.readouterr().out
    pretrain, finetune, evaluate = plan_["commands"]
    assert "configs/pretrain.py:model=nano,res=64" in pretrain and "configs/from_dit.py:task=depth" in finetune
    folder = pretrain.split("--workdir ")[1].split()[0]
    assert f"init={folder}" in finetune and f"train.steps={plan_['choice']['stage_steps'][1]}" in finetune
    assert f"--model {finetune.split('--workdir ')[1].split()[0]}" in evaluate
    assert "GB by the dry run, of 16.9 GB" in text
    assert main([*words, "--memory", "1e-6"]) == 2
    assert "does not fit" in capsys.readouterr().err
