"""Published CLIP text encoders: names, config files, tokenizers, whole folders, and folders that are damaged."""

import gzip
import json
import shutil
import subprocess
import sys

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.numpy import load_file, save_file

from scaling_perception.interop.hf_clip import (
    Clip,
    clip_config_from_json,
    clip_config_to_json,
    clip_from_torch,
    clip_to_torch,
    load_clip,
    load_tokenizer,
    task_context,
)
from scaling_perception.interop.safetensors_io import flatten_tree
from scaling_perception.models.clip_text import CLIPTextConfig, abstract_params, encode_text
from scaling_perception.support.errors import UserError

NANO = CLIPTextConfig(vocab_size=11, width=8, layers=2, heads=2, hidden=12, max_positions=6, projection_dim=3)
CASES = ("quickgelu", "gelu_legacy")
PASSES = ("depth", "amodal", "flow_x", "flow_y")


def random_state(config=NANO):
    rng = np.random.default_rng(3)
    zeros = {k: np.zeros(v.shape, np.float32) for k, v in flatten_tree(abstract_params(config)).items()}
    tree = {}
    for name, leaf in zeros.items():
        *above, last = name.split("/")
        node = tree
        for part in above:
            node = node.setdefault(part, {})
        node[last] = rng.normal(size=leaf.shape).astype(np.float32)
    return tree, clip_to_torch(tree, config)


def assert_same(one, two):
    one, two = flatten_tree(one), flatten_tree(two)
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].dtype == two[name].dtype
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)


@pytest.fixture(scope="module")
def golden_folders(golden):
    return {name: golden / "checkpoints" / f"clip_{name}" for name in CASES}


@pytest.fixture(scope="module")
def loaded(golden_folders):
    return {name: load_clip(folder) for name, folder in golden_folders.items()}


def test_names_both_ways_bit_for_bit():
    tree, state = random_state()
    assert len(state) == 2 + 2 * 16 + 2 + 1
    assert state["text_model.encoder.layers.1.self_attn.q_proj.weight"].shape == (8, 8)
    np.testing.assert_array_equal(
        state["text_model.encoder.layers.1.self_attn.q_proj.weight"], tree["blocks"]["attn"]["query"]["kernel"][1].T
    )
    buffer = {"text_model.embeddings.position_ids": np.arange(6)[None]}
    assert_same(clip_from_torch({**buffer, **state}, NANO), tree)
    short = {name.removeprefix("text_model."): value for name, value in {**buffer, **state}.items()}
    assert_same(clip_from_torch(short, NANO), tree)
    half = {name: value.astype(np.float16) for name, value in state.items()}
    assert_same(clip_to_torch(clip_from_torch(half, NANO, dtype=None), NANO), half)


def test_every_tensor_that_does_not_fit_is_named():
    tree, state = random_state()
    bias = "text_model.encoder.layers.1.mlp.fc2.bias"
    with pytest.raises(UserError, match=rf"^a\.st.*'{bias}' \(8,\) is missing"):
        clip_from_torch({k: v for k, v in state.items() if k != bias}, NANO, origin="a.st")
    with pytest.raises(UserError, match=rf"'{bias}' has shape \(9,\) but \(8,\)"):
        clip_from_torch({**state, bias: np.zeros(9)}, NANO)
    for extra in ("text_model.encoder.layers.2.mlp.fc2.bias", "embeddings.position_ids", "logit_scale"):
        with pytest.raises(UserError, match=rf"'{extra}' has no place"):
            clip_from_torch({**state, extra: np.zeros(8)}, NANO)
    for change, text in (({"projection": {}}, "projection"), ({"token_embed": np.zeros(3)}, "token_embed has shape")):
        changed = {k: v for k, v in {**tree, **change}.items() if len(v)}
        with pytest.raises(UserError, match=text):
            clip_to_torch(changed, NANO)


def test_config_files(golden_folders):
    fields = json.loads((golden_folders["gelu_legacy"] / "text_encoder" / "config.json").read_text())
    config = clip_config_from_json(fields)
    expected = CLIPTextConfig(814, 32, 3, 4, 128, 77, "gelu", 1e-5, 0, 2, 812, 1)
    assert config == expected  # CLIPTextModel has no projection, whatever projection_dim says
    assert clip_config_from_json(clip_config_to_json(config)) == config
    assert clip_config_from_json(clip_config_to_json(NANO)) == NANO
    whole = {"model_type": "clip", "projection_dim": 20, "text_config": fields, "vision_config": {"hidden_act": "no"}}
    assert clip_config_from_json(whole).projection_dim == 20
    # the older way is believed, with the defaults of what it leaves out
    older = clip_config_from_json({**whole, "text_config_dict": {"hidden_size": 64, "num_attention_heads": 4}})
    assert older == CLIPTextConfig(width=64, heads=4, projection_dim=20)
    assert clip_config_from_json({"model_type": "clip_text_model"}) == CLIPTextConfig()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new'.*'quick_gelu' or 'gelu'"),
        ({"eos_token_id": [2, 3]}, r"eos_token_id is \[2, 3\]"),
        ({"model_type": "siglip_text_model"}, "model_type is 'siglip_text_model'"),
        ({"is_decoder": True}, "is_decoder is True"),
        ({"hidden_size": "768"}, "hidden_size is '768'"),
        ({"num_attention_heads": 5}, "heads=5"),
    ],
)
def test_config_fields_that_are_not_supported_are_named(change, text):
    with pytest.raises(UserError, match=rf"^c\.json: .*{text}"):
        clip_config_from_json({**clip_config_to_json(NANO), **change}, "c.json")


def test_a_config_of_something_else():
    with pytest.raises(UserError, match="describes no CLIP"):
        clip_config_from_json({"block_out_channels": [32]})
    with pytest.raises(UserError, match="model_type is 'siglip'"):
        clip_config_from_json({"model_type": "siglip", "text_config": {}})


@pytest.mark.parametrize("name", CASES)
def test_published_folders_give_the_recorded_values(loaded, golden_folders, golden, name):
    params, config, tokenize = loaded[name]
    recorded = json.loads((golden_folders[name] / "expected_ids.json").read_text())
    ids = tokenize([row["text"] for row in recorded])
    assert ids.dtype == np.int32 and len(recorded) == 20
    np.testing.assert_array_equal(ids, [row["padded77"] for row in recorded])
    tokenizer = load_tokenizer(golden_folders[name] / "tokenizer")
    assert tokenizer([row["text"] for row in recorded])["input_ids"] == [row["ids"] for row in recorded]
    assert tokenize([]).shape == (0, 77)

    arrays = load_file(golden / "clip_text" / f"{name}.safetensors")
    made = encode_text(config, params, arrays["in/input_ids"].astype(np.int32))
    np.testing.assert_allclose(made.last_hidden_state, arrays["out/last_hidden_state"], atol=3e-5, rtol=1e-4)
    np.testing.assert_allclose(made.pooled, arrays["out/pooler_output"], atol=3e-5, rtol=1e-4)
    assert (made.text_embeds is None) == (name == "gelu_legacy")
    file = load_file(golden_folders[name] / "text_encoder" / "model.safetensors")
    file.pop("text_model.embeddings.position_ids", None)
    assert_same(clip_to_torch(params, config), file)
    # the encoder's own folder finds the tokenizer beside it
    assert_same(load_clip(golden_folders[name] / "text_encoder").params, params)


def test_the_whole_vocabulary(shared_dir, tmp_path):
    """Ids of transformers over OpenAI's merges, with both padding tokens."""
    folder = shared_dir / "golden" / "tokenizer"
    merges = gzip.open(folder / "bpe_simple_vocab_16e6.txt.gz", "rt", encoding="utf-8").read().split("\n")[1:48895]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    words = letters + [letter + "</w>" for letter in letters] + ["".join(merge.split()) for merge in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    rows = json.loads((folder / "clip_tokenisation.json").read_text())["rows"]
    for pad, prefix in (("<|endoftext|>", "transformers"), ("!", "sd2_pad")):
        settings = {"tokenizer_class": "CLIPTokenizer", "pad_token": pad, "model_max_length": 77}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        tokenizer = load_tokenizer(tmp_path)
        assert len(tokenizer) == 49408
        padded = tokenizer([r["text"] for r in rows], padding="max_length", max_length=77, truncation=True)
        assert tokenizer([row["text"] for row in rows])["input_ids"] == [row[f"{prefix}_ids"] for row in rows]
        assert padded["input_ids"] == [row[f"{prefix}_padded77"] for row in rows]


def test_task_context(loaded):
    for clip in loaded.values():
        width = clip.config.projection_dim or clip.config.width
        prompts = {"flow_y": "motion down", "depth": "how far is it"}
        table = task_context(prompts, clip, PASSES)
        assert table.shape == (4, width) and table.dtype == np.float32
        made = encode_text(clip.config, clip.params, clip.tokenize(["how far is it", "motion down"]))
        rows = made.pooled if made.text_embeds is None else made.text_embeds
        np.testing.assert_allclose(table[[0, 3]], rows, atol=1e-6)
        assert not table[1:3].any() and table[0].any() and not np.allclose(table[0], table[3])
        assert not task_context({}, clip, PASSES).any()
        with pytest.raises(UserError, match="'flow', which is no pass; did you mean"):
            task_context({"flow": "motion"}, clip, PASSES)
    broken = Clip(clip.params, clip.config, lambda texts: np.full((len(texts), 3), 10**6))
    with pytest.raises(UserError, match="1000000 is not in"):
        task_context({"depth": "x"}, broken, PASSES)


@pytest.fixture
def folder(golden_folders, tmp_path):
    """A copy that a test may damage."""
    shutil.copytree(golden_folders["quickgelu"], tmp_path / "sd", copy_function=shutil.copyfile)
    for path in [tmp_path / "sd", *(tmp_path / "sd").rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    return tmp_path / "sd"


def edit(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def head(path, lines):
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:lines]))


DAMAGE = {
    "no config": (lambda f: (f / "text_encoder/config.json").unlink(), r"config\.json does not exist"),
    "half a config": (lambda f: halve(f / "text_encoder/config.json"), r"config\.json is not valid JSON"),
    "a list": (lambda f: (f / "text_encoder/config.json").write_text("[]"), "is no description"),
    "no weights": (lambda f: (f / "text_encoder/model.safetensors").unlink(), r"has no model\.safetensors"),
    "half the weights": (lambda f: halve(f / "text_encoder/model.safetensors"), r"model\.safetensors is no whole"),
    "pickle": (
        lambda f: (f / "text_encoder/model.safetensors").rename(f / "text_encoder/pytorch_model.bin"),
        r"pytorch_model\.bin is a pickled",
    ),
    "other sizes": (lambda f: edit(f / "text_encoder/config.json", hidden_size=42), r"has shape \(48,\) but \(42,\)"),
    "more layers": (lambda f: edit(f / "text_encoder/config.json", num_hidden_layers=3), r"layers\.2\..* is missing"),
    "fewer layers": (lambda f: edit(f / "text_encoder/config.json", num_hidden_layers=1), r"layers\.1\..* no place"),
    "other end": (lambda f: edit(f / "text_encoder/config.json", eos_token_id=3), "ends texts with 713"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "has no tokenizer"),
    "no merges": (lambda f: (f / "tokenizer/merges.txt").unlink(), r"merges\.txt is missing"),
    "no vocabulary": (lambda f: (f / "tokenizer/vocab.json").unlink(), r"vocab\.json is missing"),
    "half the vocabulary": (lambda f: halve(f / "tokenizer/vocab.json"), "no whole CLIP tokenizer"),
    "half the merges": (lambda f: halve(f / "tokenizer/merges.txt"), "no whole CLIP tokenizer"),
    "fewer merges": (lambda f: head(f / "tokenizer/merges.txt", 150), "no merge makes .*copy its merges.txt"),
    "a page": (lambda f: (f / "tokenizer/vocab.json").write_text("<html>"), "no whole CLIP tokenizer"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_folders_give_one_line(folder, what):
    damage, text = DAMAGE[what]
    damage(folder)
    with pytest.raises(UserError, match=text) as caught:
        load_clip(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_other_forms_of_a_folder(folder, loaded):
    """One folder for all; half precision; a whole CLIP model, of which the text tower is taken; no architectures."""
    encoder, expected = folder / "text_encoder", loaded["quickgelu"]
    for file in (folder / "tokenizer").iterdir():
        file.rename(encoder / file.name)
    assert_same(load_clip(encoder).params, expected.params)
    state = load_file(encoder / "model.safetensors")
    fields = json.loads((encoder / "config.json").read_text())

    vision = {"vision_model.embeddings.position_ids": np.arange(3), "logit_scale": np.array(2.0)}
    save_file({**state, **vision, "visual_projection.weight": np.ones((2, 2))}, encoder / "model.safetensors")
    with pytest.raises(UserError, match="has no place"):
        load_clip(encoder)
    whole = {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": 32, "text_config": fields}
    (encoder / "config.json").write_text(json.dumps(whole))
    assert_same(load_clip(encoder).params, expected.params)

    del fields["architectures"], state["text_projection.weight"]
    (encoder / "config.json").write_text(json.dumps(fields))
    (encoder / "model.safetensors").unlink()
    save_file({k: v.astype(np.float16) for k, v in state.items()}, encoder / "model.fp16.safetensors")
    clip = load_clip(encoder)
    assert clip.config.projection_dim == 0 and "projection" not in clip.params
    table = expected.params["token_embed"].astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(clip.params["token_embed"], table)


def test_hub_and_wrong_names(folder, monkeypatch):
    asked = []

    def fetch(name, allow_patterns, **_):
        asked.extend(allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert load_clip("owner/name").config.width == 48
    wanted = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {"expected_ids.json"}
    assert wanted <= set(asked)
    (folder / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"'owner/name' on the hub has no model\.safetensors"):
        load_clip("owner/name")

    def offline(name, allow_patterns, **_):
        raise LocalEntryNotFoundError("no connection\nand much more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match=r"'owner/name' is no folder.*\(no connection\): check"):
        load_clip("owner/name")
    with pytest.raises(UserError, match="neither a folder nor a hub id"):
        load_clip("nowhere")


def test_the_tokenizer_comes_silently_and_without_torch(golden_folders):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from scaling_perception.interop.hf_clip import load_tokenizer\n"
        "assert 'transformers' not in sys.modules\n"
        "load_tokenizer(sys.argv[1])\n"
        "import transformers; assert transformers.logging.get_verbosity() == 30"
    )
    words = [sys.executable, "-W", "error", "-c", code, str(golden_folders["quickgelu"] / "tokenizer")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
