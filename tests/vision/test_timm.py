"""The image models: the paper's form and the drop-in form, and timm's contract with both."""

import copy
import pickle
import re
from types import MappingProxyType

import pytest
import timm
import torch
from timm.models import GraphExtractNet, load_checkpoint
from timm.models.vision_transformer import Attention
from timm.optim import create_optimizer_v2, param_groups_layer_decay

from hydra_ssm import MATRICES, MatrixMixer, SelfAttention
from hydra_ssm.vision import MODELS, DropIn, HydraViT
from hydra_ssm.vision.dropin import TOLERANCE, MixerAttention
from hydra_ssm.vision.patches import resized

PAPER, DROP_IN = "vit_hydra_tiny_patch4_32", "vit_hydra_dropin_tiny_patch4_32"
SMALL = {"img_size": 16, "embed_dim": 32, "depth": 3, "headdim": 16, "d_state": 4, "num_classes": 5}
both = pytest.mark.parametrize("name", [PAPER, DROP_IN])


def small(name=PAPER, **options):
    """A model of a few thousand parameters for pictures of 16 pixels: 4 x 4 patches."""
    own = {"num_heads": 2} if "dropin" in name else {}
    return timm.create_model(name, **{**SMALL, **own, **options}).eval()


def pictures(height=16, width=16, channels=3):
    return torch.randn(2, channels, height, width)


def count(name, **options):
    with torch.device("meta"):
        return sum(p.numel() for p in timm.create_model(name, **options).parameters())


# ------------------------------------------------------------------------------------------------------ what they are


def test_the_base_model_is_the_papers():
    with torch.device("meta"):
        model = timm.create_model("vit_hydra_base_patch16_224")
    assert isinstance(model, HydraViT)
    assert (len(model.encoder.layers), model.embed_dim, model.patch_embed.patch_size) == (24, 768, (16, 16))
    assert (model.order, model.pos_embed, model.global_pool, model.num_prefix_tokens) == ("row", None, "avg", 0)
    assert all(layer.feed_forward is None for layer in model.encoder.layers)
    mixers = sum(p.numel() for layer in model.encoder.layers for p in layer.mixer.parameters())
    assert mixers == 24 * 3_825_224 == 91_805_376
    assert sum(p.numel() for p in model.parameters()) == 93_203_368


def test_the_papers_form_is_what_it_says():
    model, x = small().double(), pictures().double()
    patches = x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(2, 16, -1)  # row by row
    h = patches @ model.patch_embed.proj.weight.flatten(1).T + model.patch_embed.proj.bias
    for layer in model.encoder.layers:
        h = h + layer.mixer(layer.norm(h))
    expected = model.head(model.encoder.last_norm(h).mean(1))
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)


def test_drop_in_blocks_are_timms_with_a_mixer_for_attention():
    model = small(DROP_IN)
    assert isinstance(model, timm.models.vision_transformer.VisionTransformer)
    for block in model.blocks:
        assert type(block) is timm.models.vision_transformer.Block
        assert isinstance(block.attn, MixerAttention)
        assert isinstance(block.attn.mixer, MatrixMixer)
    x = torch.randn(2, 16, 32)
    block = model.blocks[0]
    h = x + block.attn.mixer(block.norm1(x))
    torch.testing.assert_close(block(x), h + block.mlp(block.norm2(h)))
    with pytest.raises(ValueError, match="attn_mask and is_causal must be left out"):
        block.attn(x, attn_mask=torch.ones(2, 1, 16, 16))


def test_with_attention_the_drop_in_form_is_timms_vit():
    model = small("vit_attention_dropin_tiny_patch4_32", pos_embed="learn").double()
    vit = timm.models.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=32, depth=3, num_heads=2, num_classes=5, class_token=False,
        global_pool="avg",
    ).double().eval()  # fmt: skip
    assert isinstance(vit.blocks[0].attn, Attention)
    assert isinstance(model.blocks[0].attn.mixer, SelfAttention)
    state = {}
    for key, value in model.state_dict().items():
        own = key.replace("attn.mixer.in_proj", "attn.qkv").replace("attn.mixer.out_proj", "attn.proj")
        state[own] = torch.cat([*value.chunk(3)[1:], value.chunk(3)[0]]) if "qkv" in own else value  # v | q | k here
    vit.load_state_dict(state)
    x = pictures().double()
    torch.testing.assert_close(model(x), vit(x), rtol=0, atol=1e-12)
    assert count("vit_attention_dropin_base_patch16_224") == count("vit_base_patch16_224", class_token=False,
                                                                   global_pool="avg")  # fmt: skip


def test_drop_ins_have_the_parameters_of_a_vit():
    """Those of other sizes are on docs/vision.md, and checked with it."""
    vit = count("vit_attention_dropin_tiny_patch4_32")
    rows = [(name, None) for name in ("hydra", *MATRICES)]
    rows += [(name, False) for name, matrix in MATRICES.items() if matrix.data_dependent and matrix.fixed]
    for name, form in rows:
        own = count(f"vit_{name}_dropin_tiny_patch4_32", data_dependent=form)
        assert abs(own - vit) <= TOLERANCE * vit, (name, form, own, vit)


def test_the_papers_form_for_32_pixels_has_the_parameters_of_a_vit():
    for size in ("tiny", "small"):
        vit = count(f"vit_attention_dropin_{size}_patch4_32")
        assert abs(count(f"vit_hydra_{size}_patch4_32") - vit) <= 0.02 * vit


def test_every_name_makes_a_model_of_its_own_size():
    assert len(MODELS) == len(set(MODELS)) == 5 + 17 * 5
    for name in MODELS:
        assert timm.is_model(name)
        cfg = timm.get_pretrained_cfg(name)
        if "tiny_patch4_32" in name:
            assert cfg.input_size == (3, 32, 32)
            with torch.no_grad():
                assert timm.create_model(name, depth=1)(torch.randn(1, 3, 32, 32)).shape == (1, 10)


def test_layers_may_be_of_different_mixers():
    model = small(mixer=["hydra", "attention", {"matrix": "toeplitz", "data_dependent": False}])
    one = small(mixer=MappingProxyType({"matrix": "toeplitz"}))  # one for all
    assert {layer.mixer.matrix_class.__name__ for layer in one.encoder.layers} == {"Toeplitz"}
    kinds = [layer.mixer.matrix_class.__name__ for layer in model.encoder.layers]
    assert kinds == ["Quasiseparable", "Attention", "Toeplitz"]
    assert model(pictures()).shape == (2, 5)


# ------------------------------------------------------------------------------------------------- timm's own contract


@both
def test_every_parameter_gets_a_gradient(name):
    model = small(name, pos_embed="learn").train()
    model(pictures()).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in model.parameters())


@both
def test_features_pooling_and_classifier_are_where_timm_looks_for_them(name):
    model, x = small(name), pictures()
    features = model.forward_features(x)
    assert features.shape == (2, 16, model.num_features)
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size)
    torch.testing.assert_close(model.get_classifier()(pooled), model(x))
    cfg, state = model.default_cfg, model.state_dict()
    assert f"{cfg['classifier']}.weight" in state
    assert f"{cfg['first_conv']}.weight" in state
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), pooled)
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(x), features if name == PAPER else model.fc_norm(features))
    model.reset_classifier(3, "max")
    assert model(x).shape == (2, 3)
    assert (model.num_classes, model.global_pool) == (3, "max")


@both
def test_intermediates_are_what_the_layers_give(name):
    model, x = small(name), pictures()
    layers = model.encoder.layers if name == PAPER else model.blocks
    norm = model.encoder.last_norm if name == PAPER else model.norm
    seen = []
    handles = [layer.register_forward_hook(lambda m, i, o: seen.append(o)) for layer in layers]
    final = model.forward_features(x)
    for handle in handles:
        handle.remove()
    features, found = model.forward_intermediates(x)
    torch.testing.assert_close(features, final)
    for own, expected in zip(found, seen, strict=True):
        torch.testing.assert_close(own, expected.mT.unflatten(2, (4, 4)))
    some = model.forward_intermediates(x, [-1, 0], norm=True, output_fmt="NLC", intermediates_only=True)
    for own, expected in zip(some, (seen[0], seen[2]), strict=True):
        torch.testing.assert_close(own, norm(expected))
    (first,) = model.forward_intermediates(x, [0], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(first, found[0])
    assert len(model.forward_intermediates(x, 2, intermediates_only=True)) == 2


@both
def test_intermediates_come_by_name_and_with_prefix_tokens(name):
    own = {"d_condition": 3, "condition": "token"} if name == PAPER else {"class_token": True}
    model, x = small(name, **own), pictures()
    features, pairs = model.forward_intermediates(x, 2, return_prefix_tokens=True, norm=True)
    assert [(tuple(m.shape), tuple(p.shape)) for m, p in pairs] == [((2, 32, 4, 4), (2, 1, 32))] * 2
    named = model.forward_intermediates(x, 2, return_prefix_tokens=True, norm=True, output_dict=True)
    torch.testing.assert_close(named["image_intermediates"], [m for m, _ in pairs])
    torch.testing.assert_close(named["image_features"], features)
    if name == PAPER:
        torch.testing.assert_close(pairs[-1][1], features[:, :1])
    assert named["image_intermediates_prefix"][1].shape == (2, 1, 32)


def test_stopping_early_runs_no_later_layer():
    model = small()
    model.encoder.layers[2] = None
    model.forward_intermediates(pictures(), [0, 1], stop_early=True, intermediates_only=True)
    with pytest.raises(TypeError):
        model.forward_intermediates(pictures(), [0, 1])


@both
def test_features_only_gives_maps_of_the_layers_asked_for(name):
    model, x = small(name, features_only=True, out_indices=(0, 2)), pictures()
    assert model.feature_info.channels() == [32, 32]
    assert model.feature_info.reduction() == [4, 4]
    maps = model(x)
    assert [tuple(m.shape) for m in maps] == [(2, 32, 4, 4)] * 2
    whole = small(name)
    whole.prune_intermediate_layers([0])
    assert len(whole.encoder.layers if name == PAPER else whole.blocks) == 1
    assert whole(x).shape == (2, 16, 32)


@both
def test_checkpointing_saves_memory_and_changes_no_gradient(name):
    model, x, found = small(name).train(), pictures(), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t.numel()) or t, lambda t: t):
            loss = model(x).square().sum()
        loss.backward()
        found.append((sum(saved), [p.grad.clone() for p in model.parameters()]))
    torch.testing.assert_close(found[1][1], found[0][1])
    assert found[1][0] < found[0][0] / 2


@both
def test_layer_decay_reaches_every_layer_and_decay_spares_what_it_should(name):
    model = small(name, pos_embed="learn")
    groups = param_groups_layer_decay(
        model, weight_decay=0.1, layer_decay=0.5, no_weight_decay_list=model.no_weight_decay()
    )
    names = {id(p): n for n, p in model.named_parameters()}
    scale = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    decay = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    assert scale.keys() == set(names.values())
    layer = "encoder.layers.{}.norm.weight" if name == PAPER else "blocks.{}.norm1.weight"
    assert scale["patch_embed.proj.weight"] == scale["pos_embed"] == 0.5**4
    assert [scale[layer.format(i)] for i in range(3)] == [0.5**3, 0.5**2, 0.5]
    assert scale["head.weight"] == 1
    spared = {n for n in decay if decay[n] == 0}
    assert {n for n in names.values() if re.search(r"A_log|dt_bias|\.D$|norm|bias|pos_embed", n)} == spared
    assert {n for n in model.no_weight_decay() if n.endswith("A_log")} == {n for n in spared if n.endswith("A_log")}
    assert len(create_optimizer_v2(model, opt="adamw", weight_decay=0.1, layer_decay=0.5).param_groups) > 4


@both
def test_decays_steps_skips_and_positions_are_named_as_taking_no_weight_decay(name):
    model = small(name, pos_embed="learn")
    own = {n for n, p in model.named_parameters()} & model.no_weight_decay()
    prefix = "encoder.layers.{}.mixer." if name == PAPER else "blocks.{}.attn.mixer."
    assert own == {"pos_embed"} | {prefix.format(i) + n for i in range(3) for n in ("A_log", "dt_bias", "D")}


@both
def test_dynamic_size_extends_to_other_resolutions(name):
    model = small(name, dynamic_img_size=True, pos_embed="none")
    wide, narrow = pictures(24, 32), pictures()
    assert model(wide).shape == (2, 5)
    assert model.forward_intermediates(wide, intermediates_only=True)[0].shape == (2, 32, 6, 8)
    fixed = small(name, img_size=(24, 32), pos_embed="none")
    fixed.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(wide), fixed(wide))
    fixed.set_input_size((16, 16))
    torch.testing.assert_close(fixed(narrow), model(narrow))
    with pytest.raises((ValueError, AssertionError), match=r"multiple of patch_size|divisible by patch size"):
        model(torch.randn(2, 3, 18, 16))
    with pytest.raises((ValueError, AssertionError), match=r"must be of img_size|doesn't match model"):
        fixed(wide)


def test_learned_positions_are_interpolated_as_timm_does():
    model = small(pos_embed="learn", dynamic_img_size=True)
    vit = timm.models.VisionTransformer(img_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=2,
                                        class_token=False, global_pool="avg", dynamic_img_size=True)  # fmt: skip
    vit.pos_embed = model.pos_embed
    h = torch.randn(2, 6, 8, 32)
    table = resized(model.pos_embed.detach(), (4, 4), (6, 8))
    torch.testing.assert_close(vit._pos_embed(h), h.flatten(1, 2) + table)
    model.set_input_size((24, 32))
    torch.testing.assert_close(model.pos_embed, table)


def test_a_mixer_that_there_is_not_is_told_beside_those_that_there_are():
    with pytest.raises(ValueError, match=r"'foo' cannot be made .*: a mixer must be one of hydra, attention, dense, "):
        small("vit_hydra_dropin_tiny_patch4_32", mixer="foo")


@both
def test_fixed_mixers_take_one_size_and_say_so(name):
    spec = {"matrix": "toeplitz", "data_dependent": False}
    with pytest.raises(ValueError, match=r"dynamic_img_size needs .*computed from the tokens, got"):
        small(name, mixer=spec, dynamic_img_size=True)
    model = small(name, mixer=spec)
    assert model(pictures()).shape == (2, 5)
    model.set_input_size((16, 16))  # its own
    model.set_input_size(16, model.patch_embed.patch_size)
    with pytest.raises(ValueError, match=r"fixed mixers .*take pictures of \(16, 16\) alone"):
        model.set_input_size((24, 24))


@both
def test_models_are_made_on_a_device_and_in_a_precision(name):
    assert {p.device.type for p in small(name, device="meta").parameters()} == {"meta"}
    model = small(name, dtype=torch.bfloat16, pos_embed="learn")
    kept = {n for n, p in model.named_parameters() if p.dtype == torch.float32}
    assert {n.rpartition(".")[2] for n in kept} == {"A_log", "dt_bias", "D"}
    assert {p.dtype for n, p in model.named_parameters() if n not in kept} == {torch.bfloat16}
    assert model(pictures().bfloat16()).isfinite().all()


def test_patches_that_are_not_dropped_stay_in_their_order():
    """timm shuffles them, which attention does not see."""
    model = small(DROP_IN, patch_drop_rate=0.5, reg_tokens=1)
    places = torch.arange(17.0)[None, :, None].expand(8, 17, 32)
    kept = model.train().patch_drop(places)[..., 0]
    assert kept.shape == (8, 9)
    assert (kept.diff(dim=1) > 0).all()
    for options in ({"mixer": "dense", "data_dependent": False}, {"order": "hilbert"}):
        with pytest.raises(ValueError, match=r"patch_drop_rate must be 0 for fixed mixers and orders but row-major"):
            small(DROP_IN, patch_drop_rate=0.5, **options)


def test_features_are_extracted_from_a_graph_of_the_drop_in_form():
    model, x = small(DROP_IN, order="hilbert"), pictures()
    found = GraphExtractNet(model, ["blocks.1", "head"], return_dict=True)(x)
    torch.testing.assert_close(found["head"], model(x))
    expected = model.forward_intermediates(x, [1], output_fmt="NLC", intermediates_only=True)[0]
    torch.testing.assert_close(found["blocks.1"], expected)


@both
def test_other_channels_drop_paths_and_dropout(name):
    model = small(name, in_chans=1, drop_path_rate=0.5, drop_rate=0.1, proj_drop_rate=0.1)
    x = pictures(channels=1)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))
    if name == PAPER:
        assert [layer.drop_path.rate for layer in model.encoder.layers] == [0, 0.25, 0.5]
    else:
        assert [getattr(block.drop_path1, "drop_prob", 0) for block in model.blocks] == pytest.approx([0, 0.25, 0.5])


@both
def test_weights_come_back_from_a_file_and_from_a_folder_of_timms(name, tmp_path):
    model, x = small(name, pos_embed="learn"), pictures()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    other = small(name, pos_embed="learn")
    load_checkpoint(other, str(tmp_path / "weights.pth"))
    assert torch.equal(other(x), model(x))
    arguments = {**SMALL, "pos_embed": "learn", **({"num_heads": 2} if name == DROP_IN else {})}
    timm.models.save_for_hf(model, tmp_path / "folder", model_args=arguments)
    again = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).eval()
    torch.testing.assert_close(again(x), model(x))
    larger = timm.create_model(
        name, **{**SMALL, "img_size": 32, "num_classes": 3, "in_chans": 1}, pos_embed="learn", pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "weights.pth"), "num_classes": 5},
        **({"num_heads": 2} if name == DROP_IN else {}),
    )  # fmt: skip
    assert larger(torch.randn(1, 1, 32, 32)).shape == (1, 3)
    torch.testing.assert_close(larger.patch_embed.proj.weight, model.patch_embed.proj.weight.sum(1, keepdim=True))
    wide = {"pos_embed": torch.zeros(1, 8, 32)}
    with pytest.raises(
        ValueError, match=r"for 8 patches, not the 16 of img_size .*: make it with the img_size they are of"
    ):
        small(name, pos_embed="learn", pretrained=True, pretrained_cfg_overlay={"state_dict": wide})


@pytest.mark.parametrize(("name", "order"), [(PAPER, "row,snake+hilbert"), (DROP_IN, "row")])
def test_models_compile_whole(name, order):
    model, x = small(name, order=order, depth=2 if name == PAPER else 1), pictures()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))
    model.train()
    compiled(x).square().sum().backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).square().sum().backward()
    torch.testing.assert_close(found, [p.grad for p in model.parameters()])


@both
def test_models_export(name):
    model, x = small(name, depth=1), pictures()
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    larger = torch.randn(5, 3, 16, 16)
    torch.testing.assert_close(program.module()(larger), model(larger))


@both
def test_a_model_made_on_the_meta_device_can_be_drawn(name):
    with torch.device("meta"):
        model = small(name)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(torch.nan)
    model.init_weights(needs_reset=True)
    left = {n for n, p in model.named_parameters() if not p.isfinite().all()}
    assert left == set()
    assert model(pictures()).isfinite().all()


@both
def test_a_copy_is_another_model_with_the_same_weights(name):
    model = small(name)
    twin = copy.deepcopy(model)  # as EMA does
    x = pictures()
    assert torch.equal(twin(x), model(x))
    with torch.no_grad():
        twin.head.weight.zero_()
    assert not torch.equal(twin(x), model(x))
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))  # as a new process gets it


def test_half_precision_under_autocast_is_close():
    for name in (PAPER, DROP_IN):
        model, x = small(name), pictures()
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        torch.testing.assert_close(y.float(), model(x), atol=0.05, rtol=0.05)


def test_misfits_are_named():
    with pytest.raises(ValueError, match=r"img_size must be a multiple of patch_size = \(4, 4\), got \(18, 18\)"):
        small(img_size=18)
    with pytest.raises(ValueError, match="global_pool must be one of 'avg', 'max', '', got 'token'"):
        small(global_pool="token")
    with pytest.raises(ValueError, match=r"order must be of row, column, snake, hilbert, .*got 'diagonal'"):
        small(order="diagonal")
    with pytest.raises(ValueError, match="order must be one for all layers, HydraViT takes several in turn"):
        small(DROP_IN, order="row,column")
    with pytest.raises(ValueError, match="mixer must name one, or one for each of depth = 3 layers, got 2"):
        small(mixer=["hydra", "hydra"])
    with pytest.raises(ValueError, match=r"pictures must be \(batch, 3, height, width\), got \(2, 1, 16, 16\)"):
        small()(pictures(channels=1))
    for condition in ("token", "modulation"):
        model = small(d_condition=3, condition=condition)
        for shape in ((2, 4), (1, 3), (3,)):
            with pytest.raises(ValueError, match=r"condition must be .* = \(2, 3\), got"):
                model(pictures(), torch.randn(shape))
    assert isinstance(small(DROP_IN), DropIn)
