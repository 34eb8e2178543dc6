"""Numbers on command lines: one set of types, one line for what is wrong."""

import pytest

from scaling_perception.interop.find import SHIPPED
from scaling_perception.support.errors import UserError
from scaling_perception.support.verbs import _as_typed, in_flags, number_in, run_verb

EVALUATE = ("evaluate", "--task", "depth", "--dataset", "scenes", "--model", "mini", "--json", "x")
COMPILE, PREDICT = ("compile", "--config", "c", "--topology", "t"), ("predict", "x", "--task", "depth", "--out", "o")
TRAIN = ("train", "--workdir", "w", "--config", "configs/mini.py:cache=")
MINI = str(SHIPPED / "mini")
GENERATE = ("generate", "--model", "m", "--out", "o")


@pytest.mark.parametrize(
    ("words", "flag", "values"),
    [
        (EVALUATE, "--batch-size", ("-1", "0", "1.5", "many")),
        (EVALUATE, "--first", ("0",)),
        (EVALUATE, "--step-chunk", ("-2",)),
        (EVALUATE, "--panels", ("-1",)),
        (EVALUATE, "--seed", ("-1", "4294967296")),
        (EVALUATE, "--steps", ("-1", "0", "1,x", "1,2000")),
        (EVALUATE, "--ensemble", ("-1", "0")),
        (EVALUATE, "--count", ("-1",)),
        (COMPILE, "--steps", ("0", "1001")),
        (COMPILE, "--ensemble", ("-1",)),
        (GENERATE, "--guidance", ("nan", "inf", "-1")),
        (GENERATE, "--steps", ("0",)),
        (PREDICT, "--batch-size", ("0",)),
        (PREDICT, "--seconds", ("0", "nan")),
        (PREDICT, "--eta", ("inf",)),
        (PREDICT, "--clip", ("0", "nan")),
        (("prepare", "scenes", "--out", "o"), "--flow-divisor", ("0", "nan")),
        (("prepare", "scenes", "--out", "o"), "--batch", ("0",)),
        (("bench", "sample"), "--peak", ("0", "inf")),
        (("bench", "train"), "--cores", ("0",)),
        (("quickstart",), "--scenes", ("0",)),
    ],
)  # fmt: skip
def test_wrong_numbers_are_refused_and_named(words, flag, values, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for value in values:
        with pytest.raises(UserError, match=flag) as refusal:
            run_verb(words[0], [*words[1:], f"{flag}={value}"])
        assert "\n" not in str(refusal.value) and value in str(refusal.value)
    assert not list(tmp_path.iterdir())


def test_numbers_at_the_ends_are_taken():
    assert number_in("[1, 1000]")("1000") == 1000 and number_in("(0, 1]", float)("1") == 1.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*PREDICT, "--eta", "2"), "--eta 2.0: choose between"),
        ((*PREDICT, "--solver", "magic"), "unknown --solver 'magic'"),
        ((*PREDICT, "--aspect", "crop"), "unknown --aspect 'crop'"),
        ((*PREDICT, "--step-tolerance", "0.1", "--eta", "1"), "--step-tolerance goes with .*: --eta 0"),
        ((*PREDICT, "--step-tolerance", "0.1", "--steps", "4"), "--step-tolerance needs two checks .* 4 steps have 1"),
        ((*PREDICT, "--first", "3"), "--first goes with --tolerance"),
        ((*PREDICT, "--step-chunk", "3"), "--step-chunk goes with --step-tolerance"),
        ((*EVALUATE, "--first", "3"), "--first goes with --tolerance"),
        ((*PREDICT, "--members-per-round", "3"), "--members-per-round goes with --tolerance"),
        ((*PREDICT, "--members-per-round=x",), "--members-per-round: 'x'"),
        ((*PREDICT, "--first=x",), "--first: 'x'"),
        *(
            ((*verb, *words), f"--cache-interval {message}")
            for verb in (PREDICT, EVALUATE)
            for words, message in (
                (("--cache-interval", "3"), "goes with --cache: give that too"),
                (("--cache", "none", "--cache-interval", "3"), "has no effect with --cache none: leave it out"),
            )
        ),
        ((*EVALUATE, "--aspect", "crop"), "unknown --aspect 'crop'"),
        ((*EVALUATE, "--step-tolerance", "0.1", "--cache", "fora"), "--cache 'fora' does not go with --step-tolerance"),
        ((*EVALUATE, "--reduce", "mode"), "--reduce 'mode' is no way to merge depth members"),
        (("evaluate", "--task", "generation", "--dataset", "textures", "--model", "mini"), "--task generation has no"),
        (("evaluate", "--task", "depth", "--dataset", "nyuv2", "--model", "mini"), "nyuv2 needs --data: the folder"),
        (("evaluate", "--task", "depth", "--dataset", "nyu", "--model", "mini"), "unknown --dataset 'nyu'"),
        (("prepare", "folder", "--out", "o", "--tasks", "depth"), "folder needs --raw: the folder"),
        (("prepare", "scenes", "--out", "o", "--count", "2", "--split", "x"), "scenes have no split 'x'"),
        (("fit", "no.csv", "--json", "."), "^--json .: it is there and is no regular file"),
        (("fit", "p.csv", "--json", "d"), "^--json d: it is there"),
        (("fit", "p.csv", "--json", "a.html", "--html", "./a.html"), "^--json and --html are both ./a.html"),
        (("fit", "p.csv", "--seed", "-1"), "--seed"),
        (("fit", "p.csv", "--tau", "0.1"), "^--tau 0.1 is of --loss quantile, not of --loss huber"),
        (("fit", "p.csv", "--delta", "0.1", "--loss", "lsq"), "^--delta 0.1 is of --loss huber"),
        (("fit", "p.csv", "--form", "hull", "--loss", "lsq"), "^--loss lsq is not of --form hull"),
        (("fit", "p.csv", "--form", "hull", "--interval", "bca"), "^--interval bca is not of --form hull"),
        (("fit", "p.csv", "--serve", "3"), "^--serve is of the frontier"),
        (("plan", "--law", "no.json", "--budget", "1e9"), "^--law no.json does not exist"),
        (("plan", "--law", "x", "--budget", "1e9", "--next-share", "7"), "^--next-share 7: give a share"),
        (("convert", MINI, "o", "--layout", "diT"), "^--layout 'diT'; did you mean 'dit'"),
        (("convert", MINI, "o", "--layout", "dit"), "not --layout 'dit'"),
        (("convert", MINI, "o", "--heads", "3"), "not a multiple of --heads 3"),
        (("convert", MINI, "o", "--active", "3"), "^--active 3: .*mini has no experts"),
        ((*TRAIN, "--config.train.steps=0"), "^--config.train.steps is 0"),
        ((*TRAIN, "--config.train.steps=x"), "^--config.train.steps is 'x'"),
        ((*TRAIN, "--config.diffusion=x"), "^--config.diffusion is 'x'; known"),
        ((*TRAIN, "--config.train.step=1"), "^unknown field --config.train.step; did you mean 'train.steps'"),
        (("train", "--workdir", "w", "--config", "configs/mini.py:cache=no/cache"), ":cache=no/cache is no latent"),
        ((*TRAIN, "--profile", "0:2"), "^--profile is '0:2'"),
    ],
)  # fmt: skip
def test_messages_name_flags(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").touch()
    (tmp_path / "d").mkdir()
    (tmp_path / "p.csv").write_text("macs,absrel\n" + "".join(f"{10.0**i},{10.0 ** (-i / 4)}\n" for i in range(6, 13)))
    with pytest.raises(UserError, match=message):
        run_verb(words[0], list(words[1:]))


def test_a_message_gets_the_flag_that_was_typed():
    words = ["--law", "a.json", "b/c.json", "--unit=macs", "--config", "f.py:root=/data/x,steps=3"]
    assert _as_typed("b/c.json is no law", words) == "--law b/c.json is no law"
    assert _as_typed("a law a.json.old or data/a.json", words) == "a law a.json.old or data/a.json"
    assert _as_typed("macs would be 3", words) == "--unit=macs would be 3"
    assert _as_typed("no macs", words) == "no macs"
    assert _as_typed("no folder m/n", ["--config.init=m/n"]) == "no folder --config.init=m/n"
    assert _as_typed("a.json: give --images", words) == "a.json: give --images"
    inputs = ["--out", "o", "no.jpg", "--json", "more/no.jpg"]
    for name in ("no.jpg", "more/no.jpg"):  # what follows the values of a flag is no value of it
        assert _as_typed(f"{name} is no file", inputs, {"--out": 1, "--json": 0}) == f"{name} is no file"
    assert _as_typed("nothing in /data/x, make it", words) == "nothing in --config f.py:root=/data/x, make it"


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        ((*PREDICT, ""), "an input"),
        ((*PREDICT, "--overwrite", "  "), "an input"),
        ((*PREDICT, "--", ""), "an input"),
        (("predict", "x", "--task", "depth", "--out", ""), "--out"),
        ((*PREDICT, "--align="), "--align"),
        ((*PREDICT, "--first", ""), "--first"),
        ((*EVALUATE, "--autoencoder", ""), "--autoencoder"),
        ((*EVALUATE, "--option", "a=1", "--data", ""), "--data"),
        (("bench", "sample", "--json", ""), "--json"),
        (("fit", "p.csv", "--x", "a", ""), "--x"),
        ((*TRAIN[:2], "", *TRAIN[3:]), "--workdir"),
    ],
)
def test_empty_values_are_refused(words, flag, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"^{flag} is empty: give a value"):
        run_verb(words[0], list(words[1:]))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("verb", "one", "two"), [(COMPILE, "--json", "--hlo"), (EVALUATE[:-2], "--csv", "--per-image")]
)
def test_two_outputs_are_two_files(verb, one, two, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "pipe").symlink_to("/dev/null")
    with pytest.raises(UserError, match=f"^{one} and {two} are both b: give two names"):
        run_verb(verb[0], [*verb[1:], one, "a", two, "b"])
    with pytest.raises(UserError, match=f"^{two} pipe: it is there and is no regular file"):
        run_verb(verb[0], [*verb[1:], one, "a", two, "pipe"])


def test_names_are_flags_where_a_value_follows():
    flags = {"steps": "--steps", "eta": "--eta", "step_chunk": "--step-chunk", "a root": "--data"}
    assert in_flags("eta 1 with 4 steps, see runs/eta 1 and step_chunk", flags) == (
        "--eta 1 with 4 steps, see runs/eta 1 and --step-chunk"
    )
    assert in_flags("--steps 3: steps '3'; it needs a root", flags) == "--steps 3: --steps '3'; it needs --data"
