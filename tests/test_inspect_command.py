"""hydra-ssm inspect: one command, a table, a picture, and a page that is read in a browser."""

import base64
import contextlib
import io
import json
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import browser, find_browser
from PIL import Image

from hydra_ssm import MATRICES, MatrixMixer
from hydra_ssm.cli import main
from hydra_ssm.inspection import Mixing, mixing_matrices, picture, report
from hydra_ssm.inspection.page import BYTES, fits, page
from hydra_ssm.inspection.picture import colour_limit, draw, save
from hydra_ssm.text import HydraConfig, HydraForMaskedLM, HydraForSequenceClassification
from hydra_ssm.text.inference import TextModel
from hydra_ssm.text.tokenizer import train_tokenizer

LINE = 'the big cat sees </script> <img src=x onerror="alert(1)"> and "$x$" & the dog\'s {{DATA}} .'
SENTENCE = 'the cat sees </script> <img src=x onerror="alert(1)"> "$x$" & {{DATA}}'
LONGEST = 70
SPECS = [{"matrix": name} for name in MATRICES]
SPECS += [{"matrix": name, "data_dependent": False} for name in MATRICES if MATRICES[name].data_dependent]


def save_model(folder, mixers, model=HydraForMaskedLM, **options):
    tokenizer = train_tokenizer([LINE] * 3, 200)
    sizes = {"hidden_size": 16, "headdim": 8, "d_state": 3, "vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    options = sizes | {"max_position_embeddings": LONGEST} | options
    model(HydraConfig(mixers=mixers, **options)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Every class in both forms, one a layer."""
    return save_model(tmp_path_factory.mktemp("model"), SPECS)


@pytest.fixture
def here(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to(model)
    return tmp_path


def element(text, name):
    """What a script element of a page holds."""
    return re.search(rf'<script[^>]* id="{name}">(.*?)</script>', text, re.DOTALL)[1]


def seen(folder, text, in_float32=False):
    """Tokens and mixings, found without the command."""
    loaded = TextModel(Path(folder))
    loaded.model = loaded.model.float() if in_float32 else loaded.model
    inputs = loaded.tokenizer([text], return_tensors="pt")
    tokens = loaded.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0].tolist())
    with torch.no_grad():
        return tokens, mixing_matrices(loaded.model, **inputs)


# ------------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def written(model, tmp_path_factory):
    """What the command leaves and says."""
    folder = tmp_path_factory.mktemp("written")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["inspect", str(model), SENTENCE, "--out", str(folder / "seen")]) == 0
    return folder / "seen", out.getvalue()


def test_one_command_names_every_layer_and_writes_a_picture_and_a_page(written):
    folder, out = written
    rows = {line.split()[0]: line for line in out.splitlines() if re.match(r"\d+  +[a-z]", line)}
    assert len(rows) == len(SPECS)
    for layer, spec in enumerate(SPECS):
        name = spec["matrix"]
        row = re.split(r"  +", rows[str(layer)])
        fixed = not spec.get("data_dependent", True)
        assert row[1] == name + (", fixed" if fixed else "")
        if name == "mult":
            assert row[2] == "no matrix: mult is quadratic in x and has no matrix: look at its triangles, one by one"
        else:
            assert row[2] == "4"
            assert len(row) == 8
    assert re.split(r"  +", rows["9"])[6:] == ["at most 3 below and above", "aligned"]
    assert re.split(r"  +", rows["2"])[3:] == ["3", "3", "3", "at most 3 everywhere", "aligned"]
    assert re.split(r"  +", rows["1"])[6:] == ["none", "up to row factors"]
    assert "NOT KEPT" not in out
    assert sorted(path.name for path in folder.iterdir()) == ["matrices.html", "matrices.png"]


def test_the_page_and_the_picture_go_into_the_models_folder_and_replace_only_their_own(here, capsys):
    shutil.copytree("model", "copy")
    for _ in range(2):
        assert main(["inspect", "copy", "the cat", "--layers", "0", "2-3", "--heads", "1"]) == 0
    capsys.readouterr()
    for name in ("matrices.png", "matrices.html"):
        mine = Path("copy", "inspect", name)
        kept, content = mine.read_bytes(), b"of the user"
        mine.write_bytes(content)
        assert main(["inspect", "copy", "the cat"]) == 2
        assert f"copy/inspect/{name} is not of hydra-ssm inspect and will not be replaced" in capsys.readouterr().err
        assert mine.read_bytes() == content
        mine.write_bytes(kept)


MISTAKES = {
    "nowhere cat": "nowhere must hold a model (config.json and model.safetensors), it does not",
    "foreign cat": "foreign must hold a model",
    "no_model cat": "no_model holds no model that can be read: the model_type of config.json must be ",
    "model": "Missing from hydra-ssm inspect: TEXT",
    "model ": "the text must hold a word, it is empty",
    "model \u200b": "the text must hold a word, the tokenizer finds none in '\\u200b'",
    f"model {'cat ' * 69}": f"the text must have at most {LONGEST} tokens for this model, it has 71",
    "any cat --layers 6": "layers must be numbers from 0 to 5, got 6",
    "any cat --heads 1 9": "heads must be numbers from 0 to 3, got 9",
    "any cat --heads one": "--heads must be numbers and ranges such as 0 2-5, got one",
    "any cat --layers 3-1": "--layers must be numbers and ranges such as 0 2-5, got 3-1",
    "any cat --layers 0-99999999999": "--layers must be numbers and ranges such as 0 2-5, got 0-99999999999",
    f"any {'cat ' * 511}": "the text must have at most 512 tokens to be drawn, it has 513",
    f"any {'cat ' * 505} --heads 0-3": "a page has room for 23 matrices of this size, got 24: choose fewer heads or",
    "model cat --out text.txt": "--out must be a folder, text.txt is a file",
}


@pytest.mark.parametrize("command", MISTAKES, ids=lambda command: command[:20].strip())
def test_a_mistake_is_one_line_that_says_what_must_hold(command, here, capsys):
    Path("text.txt").touch()
    Path("foreign").mkdir()
    Path("foreign", "thesis.tex").touch()
    Path("no_model").mkdir()
    for name, text in (("config.json", "{}"), ("model.safetensors", "")):
        Path("no_model", name).write_text(text, encoding="utf-8")
    save_model(Path("any"), ["hydra"] * 6, max_position_embeddings=-1)
    folder, space, rest = command.partition(" ")
    text, *options = rest.split(" --")
    options = [word for option in options for word in f"--{option}".split()]
    capsys.readouterr()
    assert main(["inspect", folder, *([text] if space else []), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("hydra-ssm: error: ")
    assert error.count("\n") == 1
    assert MISTAKES[command] in error
    assert not list(here.rglob("matrices.*"))


def test_learned_positions_limit_the_text_too(here, capsys):
    save_model(Path("bert"), ["attention"], position_embeddings=True)
    assert main(["inspect", "bert", "cat " * 69]) == 2
    assert f"at most {LONGEST} tokens for this model, it has 71" in capsys.readouterr().err
    assert main(["inspect", "bert", "cat " * 68]) == 0


def test_a_classifier_and_a_model_in_half_precision_are_looked_at_as_well(here, capsys):
    save_model(Path("classifier"), ["hydra"], HydraForSequenceClassification)
    HydraForMaskedLM.from_pretrained("classifier").bfloat16().save_pretrained("half")
    TextModel(Path("classifier")).tokenizer.save_pretrained("half")
    assert main(["inspect", "classifier", "the cat"]) == 0
    assert main(["inspect", "half", SENTENCE]) == 0
    assert capsys.readouterr().out.count("quasiseparable") == 2
    text = Path("half", "inspect", "matrices.html").read_text(encoding="utf-8")
    (head, *_), *_ = [layer["heads"] for layer in json.loads(element(text, "data"))["layers"]]
    tokens, (found,) = seen("half", SENTENCE, in_float32=True)
    held = np.frombuffer(base64.b64decode(element(text, "weights")), "<f2").astype(np.float32) * head["scale"]
    M = held[: len(tokens) ** 2].reshape(len(tokens), -1)
    np.testing.assert_allclose(M, found.matrices[0][0], rtol=1e-3, atol=1e-3 * head["scale"])


def test_a_model_that_has_diverged_is_named_as_such(here, capsys):
    save_model(Path("diverged"), ["hydra", "hydra"])
    model = HydraForMaskedLM.from_pretrained("diverged")
    torch.nn.init.constant_(model.model.encoder.layers[1].mixer.A_log, torch.nan)
    model.save_pretrained("diverged")
    capsys.readouterr()
    assert main(["inspect", "diverged", "the cat"]) == 2
    assert capsys.readouterr().err.endswith(
        "hydra-ssm: error: the matrices of diverged must be finite, those of layer 1 are not\n"
    )
    assert not Path("diverged", "inspect").exists()


def test_layers_may_have_fewer_heads_than_others(here, capsys):
    save_model(Path("hybrid"), ["attention", "hydra", "mult"])  # the Transformer's attention has half as many
    assert main(["inspect", "hybrid", "the cat", "--heads", "3"]) == 0
    rows = [re.split(r"  +", line) for line in capsys.readouterr().out.splitlines()[3:6]]
    assert rows[0] == ["0", "attention", "none of these heads, it has 2"]
    assert rows[1][:3] == ["1", "quasiseparable", "1"]
    assert rows[2][2].startswith("no matrix")


def test_a_stack_without_any_matrix_is_no_crash(here, capsys):
    save_model(Path("mult"), ["mult", "mult"])
    assert main(["inspect", "mult", "the cat"]) == 0
    said = capsys.readouterr().out
    assert said.count("no matrix: mult is quadratic") == 2
    assert "the factors are drawn, whose products with x are multiplied" in said
    page = Path("mult", "inspect", "matrices.html").read_text(encoding="utf-8")
    layers = json.loads(element(page, "data"))["layers"]
    assert [layer["layer"] for layer in layers] == ["0 →", "0 ←", "1 →", "1 ←"]
    assert all(len(layer["heads"]) == 4 and not layer["missing"] for layer in layers)
    assert "rank below, above" not in said  # there is none to explain


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as end:
        main(["inspect", "--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert 'hydra-ssm inspect runs/mine "The statement is executed when the condition is true."' in out
    assert "point at a weight to see both tokens and its value" in " ".join(out.split())


def test_a_long_text_is_thinned_out_and_takes_seconds(here, capsys):
    """12 heads of a Hydra and of a Cauchy layer, 512 tokens: dense, ranks, picture and page, on one core."""
    save_model(
        Path("long"), ["hydra", {"matrix": "cauchy"}],
        hidden_size=96, headdim=16, d_state=16, max_position_embeddings=-1,
    )  # fmt: skip
    start = time.perf_counter()
    assert main(["inspect", "long", "cat dog " * 255]) == 0
    assert time.perf_counter() - start < 30
    out = capsys.readouterr().out
    assert "matrices.html: 22 of 24 matrices, --layers and --heads choose others" in out
    assert "matrices.png: 16 of 24 matrices, --layers and --heads choose others" in out
    assert Path("long", "inspect", "matrices.html").stat().st_size < 1.4 * BYTES
    with Image.open("long/inspect/matrices.png") as image:
        assert image.width * image.height < 15_000_000


def test_the_table_measures_all_heads_of_a_short_text_and_some_at_some_places_of_a_long_one():
    assert report._affordable(30, 288, 12) == (288, None)
    heads, cuts = report._affordable(512, 288, 12)
    assert 1 <= heads < 24
    assert cuts == [128, 256, 384]
    mixings = [fake(torch.randn(2, 300, 300), layer) for layer in range(12)]
    row, *_, note = report.table(mixings).splitlines()[1:]
    assert row.split()[:6] == ["0", "dense", "2", "150", "150", "300"]
    assert note == "Looked for at 3 of 299 places, in at most 7 heads a layer."


def test_a_rank_above_the_promise_stands_out_in_the_table(model):
    _, found = seen(model, SENTENCE)
    good = found[9]
    spoiled = replace(good, matrices=(good.matrices[0] + 0.1 * torch.randn(good.matrices[0].shape),))
    assert "NOT KEPT" not in report.table([good])
    assert "at most 3 below and above (NOT KEPT)" in report.table([spoiled])


def test_a_page_that_is_too_small_for_every_layer_holds_some_of_them():
    mixings = [fake(torch.randn(4, 2, 2), layer) for layer in range(7)]
    assert report.that_fit(mixings, 28, False) is mixings
    held = report.that_fit(mixings, 27, False)
    assert [(m.layer, m.heads) for m in held] == [(layer, (0, 2, 3)) for layer in range(7)]
    held = report.that_fit(mixings, 3, False)
    assert [(m.layer, m.heads) for m in held] == [(0, (0,)), (3, (0,)), (6, (0,))]
    assert torch.equal(held[2].matrices[0], mixings[6].matrices[0][:1])


# ------------------------------------------------------------------------------------------------------- the picture


def test_the_picture_shows_each_matrix_in_its_place_with_tokens_on_the_axes(model, tmp_path):
    tokens, found = seen(model, SENTENCE)
    some = [mixing for mixing in found if mixing.layer in (1, 9, 14, 15)]  # mult among them, and concat last
    figure = draw(some, tokens)
    drawn = [axes for axes in figure.axes if axes.images]
    matrices = [(m.layer, head, M) for m in some if m.matrices for head, M in zip(m.heads, *m.matrices, strict=True)]
    assert len(drawn) == len(matrices) == 12
    save(figure, tmp_path / "seen.png")
    with Image.open(tmp_path / "seen.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    for axes, (layer, head, M) in zip(drawn, matrices, strict=True):
        (shown,) = axes.images
        assert np.array_equal(shown.get_array(), M.numpy())
        low, high = shown.get_clim()
        assert high == -low == pytest.approx(colour_limit(M))
        title = f"head {head}   ±{high:.2g}"
        assert axes.get_title() == f"layer {layer}, {title}"
        box = axes.get_window_extent()
        for i, j in [(0, 0), (2, 5), (len(M) - 1, 1)]:
            x = round(box.x0 + (j + 0.5) * box.width / len(M))
            y = round(len(pixels) - box.y1 + (i + 0.5) * box.height / len(M))
            colour = np.array(shown.cmap(shown.norm(float(M[i, j])))[:3]) * 255
            assert np.abs(pixels[y, x] - colour).max() < 12, (layer, head, i, j)
    assert [label.get_text() for label in drawn[0].get_yticklabels()] == tokens
    assert [label.get_text() for label in drawn[-1].get_xticklabels()] == tokens
    assert not any(drawn[1].get_yticklabels())
    assert next(a.get_title(loc="left") for a in figure.axes if not a.images).startswith("layer 14: no matrix, mult is")


def test_zero_is_white_and_signs_are_told_apart(tmp_path):
    M = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    mixing = fake(M)
    figure = draw([mixing], ["a", "b"])
    save(figure, tmp_path / "seen.png")
    box = figure.axes[0].get_window_extent()
    with Image.open(tmp_path / "seen.png") as image:
        at = lambda i, j: image.convert("RGB").getpixel(  # noqa: E731
            (box.x0 + (j + 0.5) * box.width / 2, image.height - box.y1 + (i + 0.5) * box.height / 2)
        )
        assert min(at(0, 0)) > 240
        assert at(0, 1)[0] > 2 * at(0, 1)[2]
        assert at(1, 0)[2] > 2 * at(1, 0)[0]


def test_tokens_of_any_letters_are_drawn_as_they_are(tmp_path, recwarn):
    tokens = ["$\\frac$", "a_b^c$x$", "漢字", "\x00\t", "w" * 300]
    figure = draw([fake(torch.randn(5, 5))], tokens)
    save(figure, tmp_path / "seen.png")
    words = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert words == [*tokens[:3], "··", "w" * 13 + "…"]
    assert not any("Glyph" in str(warning.message) for warning in recwarn)


def test_a_free_diagonal_leaves_the_rest_visible_and_an_empty_matrix_has_colours():
    M = 0.01 * torch.randn(20, 20) + 5 * torch.eye(20)
    assert 0.01 < colour_limit(M) < 0.05
    assert colour_limit(torch.zeros(3, 3)) == 1
    assert colour_limit(torch.tensor([[-2.0]])) == 2


def test_twelve_layers_of_24_heads_are_drawn_at_a_size_that_can_be_read():
    tokens = [f"token{k}" for k in range(20)]
    side, step = picture._sizes(20, 12, 24)
    assert side >= 200  # ten pixels a token
    assert step == 1
    assert 12 * 24 * side**2 < 13_000_000
    figure = draw([fake(torch.randn(24, 20, 20), layer) for layer in range(2)], tokens)
    assert len(figure.axes) == 48
    assert figure.axes[0].get_window_extent().width == pytest.approx(200)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == tokens


def fake(M, layer=0):
    """A mixing with the matrices M (heads, n, n) of a mixer that they are not of."""
    M = M if M.ndim == 3 else M[None]
    mixer = MatrixMixer(8, "dense", headdim=8, max_length=2)
    return Mixing(layer, "mixer", mixer, tuple(range(len(M))), (M,))


# ---------------------------------------------------------------------------------------------------------- the page


def test_the_page_is_one_file_without_an_address_and_text_is_never_markup(model):
    tokens, found = seen(model, SENTENCE)
    text = page(found, tokens, title=SENTENCE, summary=SENTENCE)
    assert not re.search(r"https?:|<link(?! rel=\"icon\" href=\"data:,\")|@import|url\(| src=[^x]", text)
    assert "default-src 'none'" in text
    assert text.count("<script") == text.count("</script>") == 3
    assert "<img" not in text
    data = json.loads(element(text, "data"))
    assert data["tokens"] == tokens
    assert data["summary"] == SENTENCE


def test_a_page_has_a_largest_size():
    assert fits(10) > 50_000
    assert fits(512) == 22
    assert fits(100_000) == 1


needs_browser = pytest.mark.skipif(find_browser() is None, reason="needs Chromium or Chrome, there is none on the PATH")


@pytest.fixture(scope="module")
def opened(model, written, tmp_path_factory):
    """The page of the sentence in a browser; its tokens and what of the mixings is drawn."""
    with browser(tmp_path_factory.mktemp("profile")) as tab:
        tab.file = written[0] / "matrices.html"
        tokens, found = seen(model, SENTENCE)
        yield tab, tokens, report.with_factors(found)


@pytest.fixture
def tab(opened):
    opened[0].open(opened[0].file)
    return opened[0]


def place(tab, row, column):
    """Where a weight is in the window."""
    left, top, margin, cell = tab.run(
        "(b => [b.left, b.top, plan.margin, plan.cell])(document.getElementById('matrix').getBoundingClientRect())"
    )
    return left + margin + (column + 0.5) * cell, top + margin + (row + 0.5) * cell


def text_of(tab, name):
    return tab.run(f"document.getElementById('{name}').textContent")


def weight_in(text):
    return float(text.rpartition(": ")[2].replace("−", "-"))


@needs_browser
def test_the_browser_holds_the_weights_of_every_layer_and_head(opened, tab):
    _, _, found = opened
    for index, mixing in enumerate(found):
        heads = mixing.matrices[0]
        assert tab.run(f"layers[{index}].heads.length") == len(heads)
        for head, M in enumerate(heads):
            held = torch.tensor(tab.run(f"Array.from(weights(layers[{index}].heads[{head}]))")).reshape(M.shape)
            torch.testing.assert_close(held, M, rtol=1e-3, atol=1e-9 * float(M.abs().max()))


@needs_browser
def test_hovering_shows_both_tokens_and_the_weight(opened, tab):
    _, tokens, found = opened
    M = found[0].matrices[0][0]
    assert tab.run("document.getElementById('hint').hidden")
    for row, column in [(0, 0), (3, 7), (len(tokens) - 1, 2)]:
        tab.mouse(*place(tab, row, column))
        hint = text_of(tab, "hint")
        assert hint.startswith(f"{tokens[row]} ({row}) reads {tokens[column]} ({column}): ")
        assert weight_in(hint) == pytest.approx(float(M[row, column]), rel=2e-3, abs=1e-4)
        box = tab.run(
            "(b => [b.left, b.top, b.right, b.bottom])(document.getElementById('hint').getBoundingClientRect())"
        )
        assert 0 <= box[0] < box[2] <= 1400
        assert 0 <= box[1] < box[3] <= 1000
    tab.mouse(5, 5)
    assert tab.run("document.getElementById('hint').hidden")


@needs_browser
def test_layer_and_head_are_chosen_from_lists_or_from_the_overview(opened, tab):
    _, _, found = opened
    layer = next(index for index, mixing in enumerate(found) if mixing.mixer.matrix_class is MATRICES["concat"])
    for name, value in (("layer", layer), ("head", 3)):
        tab.run(
            f"(s => {{ s.value = {value}; s.dispatchEvent(new Event('change')); }})(document.getElementById('{name}'))"
        )
    assert text_of(tab, "kind") == "Concat"
    tab.mouse(*place(tab, 1, 5))
    assert weight_in(text_of(tab, "hint")) == pytest.approx(
        float(found[layer].matrices[0][3][1, 5]), rel=2e-3, abs=1e-4
    )
    options = tab.run("[...document.getElementById('layer').options].map(o => [o.text, o.disabled])")
    assert options[13:17] == [["13", False], ["14 →", False], ["14 ←", False], ["15", False]]
    left, top, names, size = tab.run(
        "(b => [b.left, b.top, thumb.names, thumb.size])(document.getElementById('overview').getBoundingClientRect())"
    )
    tab.click(left + names + 2.5 * size, top + 16 + 1.5 * size)
    assert tab.run("[now.layer, now.head]") == [1, 2]
    assert tab.run("['layer', 'head'].map(id => document.getElementById(id).value)") == ["1", "2"]


@needs_browser
def test_the_keyboard_does_what_the_mouse_does_and_says_it_aloud(opened, tab):
    _, tokens, found = opened
    tab.run("document.getElementById('matrix').focus()")
    for key in (
        "ArrowDown",
        "ArrowDown",
        "ArrowRight",
        "ArrowRight",
        "ArrowLeft",
        "ArrowUp",
        "ArrowDown",
        "]",
        "PageDown",
    ):
        tab.key(key)
    assert tab.run("[now.layer, now.head, now.row, now.column]") == [1, 1, 1, 1]
    M = found[1].matrices[0][1]
    assert weight_in(text_of(tab, "hint")) == pytest.approx(float(M[1, 1]), rel=2e-3, abs=1e-4)
    tab.key("ArrowRight")
    assert text_of(tab, "said").startswith(f"{tokens[1]} (1) reads {tokens[2]} (2): ")
    assert tab.run("document.getElementById('said').getAttribute('aria-live')") == "polite"
    for _ in range(20):
        tab.key("PageDown")  # over the layers that have no matrix, to the last
    assert tab.run("now.layer") > 14
    tab.key("Escape")
    assert tab.run("document.getElementById('hint').hidden")


@needs_browser
def test_the_keyboard_brings_a_weight_into_view(opened, tmp_path):
    tab, *_ = opened
    path = tmp_path / "large.html"
    path.write_text(page([fake(torch.randn(300, 300))], [f"t{k}" for k in range(300)]), encoding="utf-8")
    tab.open(path, width=800, height=500)
    tab.run("document.getElementById('matrix').focus(); point(290, 290)")
    tab.key("ArrowRight")
    x, y = place(tab, 290, 291)
    assert 0 < x < 800
    assert 0 < y < 500
    tab.run("point(3, 3)")
    tab.key("ArrowRight")
    x, y = place(tab, 3, 4)
    assert 0 < x < 800
    assert 0 < y < 500


@needs_browser
def test_a_click_holds_a_weight(tab):
    tab.click(*place(tab, 2, 4))
    tab.mouse(*place(tab, 5, 5))
    assert tab.run("[now.row, now.column]") == [2, 4]
    tab.click(*place(tab, 2, 4))
    tab.mouse(*place(tab, 5, 5))
    assert tab.run("[now.row, now.column]") == [5, 5]


@needs_browser
def test_tokens_are_text_and_nothing_is_asked_from_anywhere(opened, tab):
    _, tokens, _ = opened
    assert {"<", "/", "script", ">", '"', "$"} <= set(tokens)
    assert tab.run("[...document.querySelectorAll('#row span')].map(s => s.textContent)") == tokens
    assert text_of(tab, "row").split() == tokens
    assert tab.run("document.querySelector('h1').textContent") == SENTENCE
    assert tab.run("document.title") == SENTENCE
    assert tab.run("document.images.length") == 0
    assert text_of(tab, "summary").count("at most 3 below and above") >= 2
    assert [url for url in tab.requests if not url.startswith("data:")] == [tab.file.as_uri()]
    assert tab.complaints == []


def pixel_of(taken, x, y):
    with Image.open(io.BytesIO(taken)) as image:
        return image.convert("RGB").getpixel((int(x), int(y)))


@needs_browser
def test_the_screenshot_shows_the_matrix_in_light_and_dark(opened, tab, tmp_path):
    _, tokens, found = opened
    M = found[0].matrices[0][0]
    strong = [divmod(int(k), len(tokens)) for k in (M.argmax(), M.argmin())]
    tab.run("choose(0, 0)")
    for dark in (False, True):
        tab.dark(dark)
        taken = tab.screenshot()
        (tmp_path / f"{'dark' if dark else 'light'}.png").write_bytes(taken)
        with Image.open(io.BytesIO(taken)) as image:
            assert image.size == (1400, 1000)
        page_colour = pixel_of(taken, 3, 3)
        assert max(page_colour) < 60 if dark else min(page_colour) > 240
        red, _, blue = pixel_of(taken, *place(tab, *strong[0]))
        assert red > blue + 60
        red, _, blue = pixel_of(taken, *place(tab, *strong[1]))
        assert blue > red + 60
        ink = tab.run("getComputedStyle(document.body).color.match(/\\d+/g).map(Number)")
        assert abs(sum(ink) - sum(page_colour)) > 500
    assert tab.complaints == []


@needs_browser
def test_long_tokens_and_a_narrow_window_do_not_break_the_page(opened, tmp_path):
    tab, *_ = opened
    tokens = ["w" * 300, "\u202eevil", "\x00\x07", "漢字🙂", '<img src=x onerror="window.bad = 1">', "</script><b>"]
    path = tmp_path / "long.html"
    path.write_text(page([fake(torch.randn(3, 6, 6))], tokens), encoding="utf-8")
    tab.open(path, width=400, height=700)
    tab.mouse(*place(tab, 0, 1))
    assert text_of(tab, "hint").startswith("w" * 300 + " (0) reads")
    shown = tab.run("[...document.querySelectorAll('#column span')].map(s => s.textContent)")
    assert shown == [*tokens[:2], "··", *tokens[3:]]
    assert tab.run("[window.bad, document.images.length]") == [None, 0]
    assert [url for url in tab.requests if not url.startswith("data:")] == [path.as_uri()]
    assert tab.run("document.documentElement.scrollWidth") <= 400
    assert tab.complaints == []
