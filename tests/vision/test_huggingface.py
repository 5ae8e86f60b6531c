"""HydraForImageClassification is at home in transformers."""

import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, TrainingArguments, pipeline

from hydra_ssm.vision import HydraForImageClassification, HydraViTConfig

SMALL = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2, "headdim": 16, "d_state": 4}


def small(**options):
    return HydraForImageClassification(HydraViTConfig(**{**SMALL, "num_labels": 3, **options})).eval()


def test_the_default_configuration_is_the_papers_base_model():
    with torch.device("meta"):
        model = HydraForImageClassification(HydraViTConfig(num_labels=1000))
    assert sum(p.numel() for p in model.parameters()) == 93_203_368


def test_saved_models_come_back_by_the_auto_class(tmp_path):
    model, x = (
        small(order="row,column", mixers=["hydra", "toeplitz"], position_embeddings=True),
        torch.randn(2, 3, 16, 16),
    )
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert type(again) is HydraForImageClassification
    assert again.config.to_dict() == AutoModelForImageClassification.from_pretrained(tmp_path).config.to_dict()
    assert torch.equal(again(x).logits, model(x).logits)


def test_another_number_of_labels_draws_a_new_classifier_alone(tmp_path):
    model = small()
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    own, new = model.state_dict(), again.state_dict()
    assert new["vit.head.weight"].shape == (5, 32)
    assert 0 < new["vit.head.weight"].std() < 0.04
    assert all(torch.equal(new[name], own[name]) for name in own if "head" not in name)


def test_new_weights_are_drawn_as_the_model_draws_them():
    torch.manual_seed(3)
    model = small(hidden_size=64)
    mixer = model.vit.encoder.layers[0].mixer
    assert (mixer.A_log == 0).all()
    assert (mixer.D == 1).all()
    assert 0.015 < mixer.in_proj.weight.std() < 0.025
    assert mixer.conv1d.weight.abs().max() > 0.2


def test_weights_of_timms_model_fit():
    name = "vit_hydra_tiny_patch4_32"
    vit = timm.create_model(
        name, num_classes=3, img_size=16, embed_dim=32, depth=2, headdim=16, d_state=4, expand=2
    ).eval()
    model, x = small(), torch.randn(2, 3, 16, 16)
    model.vit.load_state_dict(vit.state_dict())
    assert torch.equal(model(x).logits, vit(x))


def test_losses_and_hidden_states():
    model, x = small(), torch.randn(2, 3, 16, 16)
    labels = torch.tensor([0, 2])
    out = model(x, labels=labels, output_hidden_states=True)
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits, labels))
    assert [tuple(h.shape) for h in out.hidden_states] == [(2, 16, 32)] * 3
    torch.testing.assert_close(out.logits, model(x).logits)
    one = small(num_labels=1)
    found = one(x, labels=torch.tensor([0.5, 1.0]))
    torch.testing.assert_close(found.loss, ((found.logits[:, 0] - torch.tensor([0.5, 1.0])) ** 2).mean())
    several, both = small(problem_type="multi_label_classification"), torch.tensor([[1.0, 0, 1], [0, 1, 1]])
    found = several(x, labels=both)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(found.logits, both)
    torch.testing.assert_close(found.loss, expected)
    numbers, three = small(problem_type="regression"), torch.randn(2, 3)
    found = numbers(x, labels=three)
    torch.testing.assert_close(found.loss, ((found.logits - three) ** 2).mean())
    with pytest.raises(ValueError, match="output_attentions must be False"):
        model(x, output_attentions=True)
    assert isinstance(model(x, return_dict=False), tuple)


def test_pipelines_and_the_auto_processor_take_pictures_of_any_size(tmp_path):
    model = small()
    model.config.id2label = {0: "roof", 1: "flower", 2: "sky"}
    model.save_pretrained(tmp_path)
    model.config.image_processor().save_pretrained(tmp_path)
    picture = Image.fromarray(load_sample_image("china.jpg"))
    found = pipeline("image-classification", model=str(tmp_path), device="cpu")(picture, top_k=3)
    assert {one["label"] for one in found} == {"roof", "flower", "sky"}
    pixels = AutoImageProcessor.from_pretrained(tmp_path)(picture, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 16, 16)
    assert -1 <= pixels.min() < -0.5 < 0.5 < pixels.max() <= 1
    expected = model(pixels).logits[0].softmax(0).tolist()
    assert {one["label"]: one["score"] for one in found} == pytest.approx(
        {model.config.id2label[i]: p for i, p in enumerate(expected)}, abs=1e-5
    )


def test_trainer_trains_it_with_checkpointing(tmp_path):
    rows = [{"pixel_values": torch.full((3, 16, 16), float(i % 2)), "labels": i % 2} for i in range(32)]
    model = small(num_labels=2)
    arguments = TrainingArguments(
        tmp_path, max_steps=15, per_device_train_batch_size=8, learning_rate=1e-2, report_to="none", use_cpu=True,
        save_strategy="no", logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    model.vit.set_grad_checkpointing()
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    assert trainer.state.log_history[-2]["loss"] < 0.3
    assert model.vit.encoder.gradient_checkpointing


def test_half_precision_keeps_decays_in_float32(tmp_path):
    small().save_pretrained(tmp_path)
    model = AutoModelForImageClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model.vit.head.weight.dtype == torch.bfloat16
    assert model.vit.encoder.layers[0].mixer.A_log.dtype == torch.float32
    assert model(torch.randn(1, 3, 16, 16, dtype=torch.bfloat16)).logits.isfinite().all()


def test_misfits_are_named():
    with pytest.raises(ValueError, match="img_size must be a multiple of patch_size"):
        HydraViTConfig(**{**SMALL, "image_size": 18})
    with pytest.raises(ValueError, match="a mixer must be one of hydra"):
        HydraViTConfig(**SMALL, mixers="mamba")
    with pytest.raises(ValueError, match="mixers must be made of arguments of MatrixMixer"):
        HydraViTConfig(**SMALL, mixers={"matrix": "toeplitz", "wrong": 1})
