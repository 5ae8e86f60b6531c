"""hydra-ssm inspect with a picture: matrices over patches, maps over the picture, for every kind of image model."""

import json

import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from hydra_ssm.cli import main
from hydra_ssm.inspection import mixing_matrices
from hydra_ssm.inspection.images import draw_maps, feature_maps, over_patches
from hydra_ssm.vision import HydraForImageClassification, HydraViT, HydraViTConfig, places
from hydra_ssm.vision.loading import load_image_model

SMALL = {"img_size": 16, "embed_dim": 32, "depth": 2, "headdim": 16, "d_state": 4, "num_classes": 3}


def applied(mixer, M, u, back):
    """What a block gives for u (1, L, D), read in the order of `back`, with entries M (H, L, L) in row order."""
    read = u[:, back.argsort()]
    z, inputs = mixer._inputs(mixer.in_proj(read), None)
    y = torch.einsum("hij,bjhp->bihp", M, inputs.x[:, back])
    y = y + inputs.x[:, back] if mixer.matrix_class.skip else y
    return mixer.out_proj(mixer.norm(y.flatten(2), z[:, back], None))


@pytest.mark.parametrize("order", ["row", "hilbert", "row,column", "snake+column"])
@torch.no_grad()
def test_matrices_over_patches_are_those_that_the_layers_applied(order):
    model = HydraViT(patch_size=4, order=order, d_condition=2, condition="token", **SMALL).double().eval()
    x = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    found = over_patches(model, x, mixing_matrices(model, x))
    states = model.hidden_states(x)
    taken = places(order, (4, 4), prefix=1)
    for layer, own in enumerate(model.encoder.layers):
        mixings = [mixing for mixing in found if mixing.layer == layer]
        orders = taken[layer % len(taken)][:, 0]
        assert len(mixings) == len(orders)
        u = own.norm(states[layer])
        y = sum(applied(own.mixer, m.matrices[0], u, o.argsort()) for m, o in zip(mixings, orders, strict=True))
        torch.testing.assert_close(states[layer] + y, states[layer + 1], rtol=0, atol=1e-11)


@torch.no_grad()
def test_matrices_of_the_drop_in_form_are_over_patches_too():
    model = (
        timm.create_model("vit_low_rank_dropin_tiny_patch4_32", **SMALL, num_heads=2, order="column").double().eval()
    )
    x = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    seen = []
    model.blocks[1].attn.register_forward_hook(lambda m, i, o: seen.append((i[0], o)))
    found = over_patches(model, x, mixing_matrices(model, x))
    back = places("column", (4, 4))[0][0, 0].argsort()
    (u, y) = seen[0]
    expected = applied(model.blocks[1].attn.mixer, found[1].matrices[0], u, back)
    torch.testing.assert_close(expected, y, rtol=0, atol=1e-11)


def test_models_that_cut_patches_in_their_own_way_are_loaded(tmp_path):
    timm.models.save_for_hf(timm.create_model("efficientvit_m0", num_classes=3), tmp_path)
    assert load_image_model(tmp_path).channels == 3


def test_maps_show_what_a_patch_reads_where_it_reads_it():
    model = HydraViT(patch_size=4, **SMALL).eval()
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        (mixing,) = over_patches(model, x, mixing_matrices(model, x, layers=[1]))
    features = feature_maps(model, x, [1])
    figure = draw_maps(torch.zeros(16, 16, 3), features, [mixing], (4, 4), [(1, 2)])
    shown = [axes.get_images() for axes in figure.axes]
    assert [len(images) for images in shown] == [2, 2, 2]
    weights = mixing.matrices[0].abs().mean(0)
    weights = weights - weights.diagonal().diag()
    assert torch.tensor(shown[2][1].get_array()).flatten().allclose(weights[6])
    assert torch.tensor(shown[1][1].get_array()).flatten().allclose(weights.mean(0))
    assert features[1].shape == (4, 4, 3)
    assert features[1].flatten(0, 1).amin(0).tolist() == [0, 0, 0]
    assert features[1].flatten(0, 1).amax(0).tolist() == [1, 1, 1]


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "flower.jpg"
    Image.fromarray(load_sample_image("flower.jpg")).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    """A model as image train leaves it."""
    arguments = {name: value for name, value in SMALL.items() if name != "num_classes"} | {"order": "hilbert+row"}
    model = timm.create_model("vit_hydra_tiny_patch4_32", num_classes=3, **arguments)
    path = tmp_path / "model"
    path.mkdir()
    torch.save(model.state_dict(), path / "pytorch_model.bin")
    described = {"architecture": "vit_hydra_tiny_patch4_32", "num_classes": 3, "model_args": arguments}
    described["pretrained_cfg"] = {"input_size": [3, 16, 16], "label_names": ["roof", "flower", "sky"], "crop_pct": 1.0}
    (path / "config.json").write_text(json.dumps(described), encoding="utf-8")
    return path


def test_the_command_writes_a_page_and_two_pictures(folder, picture, capsys):
    assert main(["inspect", str(folder), str(picture), "--patches", "0,3", "2,1"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("4 x 4 patches: ")
    assert "flower" in told.splitlines()[0]
    assert "NOT KEPT" not in told  # ranks are those in the order of reading
    for name in ("matrices.png", "maps.png"):
        with Image.open(folder / "inspect" / name) as drawn:
            assert min(drawn.size) > 200
    assert '"3,2"' in (folder / "inspect" / "matrices.html").read_text(encoding="utf-8")
    assert main(["inspect", str(folder), str(picture), "--layers", "1", "--heads", "0"]) == 0  # over its own files
    own = folder / "inspect" / "maps.png"
    own.write_bytes(picture.read_bytes())
    assert main(["inspect", str(folder), str(picture)]) == 2
    assert "maps.png is not of hydra-ssm inspect and will not be replaced" in capsys.readouterr().err


def test_the_command_takes_models_of_transformers(tmp_path, picture, capsys):
    config = HydraViTConfig(
        image_size=16, patch_size=4, hidden_size=32, num_hidden_layers=2, headdim=16, d_state=4, num_labels=3,
        order="row,column", mixers=["hydra", {"matrix": "mult"}],
    )  # fmt: skip
    HydraForImageClassification(config).save_pretrained(tmp_path / "model")
    assert main(["inspect", str(tmp_path / "model"), str(picture), "--out", str(tmp_path / "drawn")]) == 0
    assert "LABEL_" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "drawn").iterdir()) == ["maps.png", "matrices.html", "matrices.png"]


@pytest.mark.parametrize("options", [{"global_pool": ""}, {"num_classes": 0, "in_chans": 1}])
def test_a_model_that_names_no_classes_is_drawn_as_well(options, tmp_path, picture, capsys):
    arguments = {**SMALL, **options}
    model = timm.create_model("vit_hydra_tiny_patch4_32", **arguments)
    timm.models.save_for_hf(model, tmp_path / "model", model_args=arguments)
    assert main(["inspect", str(tmp_path / "model"), str(picture), "--out", str(tmp_path / "drawn")]) == 0
    assert "4 x 4 patches: no classes" in capsys.readouterr().out


def test_mistakes_are_one_line(folder, picture, tmp_path, capsys):
    def told(*arguments):
        assert main(["inspect", *map(str, arguments)]) == 2
        return capsys.readouterr().err

    assert "patches must be rows from 0 to 3 and columns from 0 to 3, got 4,0" in told(
        folder, picture, "--patches", "4,0"
    )
    assert "--patches must be rows and columns such as 3,4, got 3" in told(folder, picture, "--patches", "3")
    assert "No such file" in told(folder, tmp_path / "none.jpg")
    (tmp_path / "text.jpg").write_text("words", encoding="utf-8")
    assert "the file holds no picture of a known kind" in told(folder, tmp_path / "text.jpg")
    four = {**SMALL, "in_chans": 4}
    timm.models.save_for_hf(timm.create_model("vit_hydra_tiny_patch4_32", **four), tmp_path / "four", model_args=four)
    assert "must be of pictures of 1 or 3 channels, it is of 4" in told(tmp_path / "four", picture)
    assert "layers must be numbers from 0 to 1, got 7" in told(folder, picture, "--layers", "7")
    assert "--patches are of pictures" in told(tmp_path, "A sentence.", "--patches", "1,1")
    (folder / "pytorch_model.bin").unlink()
    assert "must hold weights, model.safetensors or pytorch_model.bin" in told(folder, picture)
