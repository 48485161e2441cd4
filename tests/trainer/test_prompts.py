"""CoOp and MaPLe against open_clip's own towers: what needs no trained weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import TINY_CLIP
from torch import Tensor, nn
from torch.nn import functional as F

from cibr import objectives
from cibr.errors import UsageError
from cibr.models import Facts
from cibr.models.prompts import Coop, CoopOptions, Maple, MapleOptions, Prompted
from cibr.objectives.classes import ClassesOptions

NAMES = ["cat", "grizzly_bear", "St. Bernard"]
BASE = "open_clip:tiny.json"
TEXT = {"text_cfg": {**TINY_CLIP["text_cfg"], "layers": 3, "context_length": 24}}
THREE_BLOCKS = {"vision_cfg": {**TINY_CLIP["vision_cfg"], "layers": 3}}
RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16, "patch_size": None}


def prompted(method: str = "coop", names: list[str] = NAMES, config: dict[str, Any] | None = None, **more: Any) -> Any:
    """A prompted model on towers of random weights."""
    torch.manual_seed(0)
    config = {**TINY_CLIP, **TEXT, **THREE_BLOCKS, **(config or {})}
    base = {"model_cfg": config, "preprocess_cfg": {}, "tokenizer": None, "pretrained_text": False}
    if method == "coop":
        return Coop(CoopOptions(model=f"coop:{BASE}", **more), {"base": base, "classes": names})
    return Maple(MapleOptions(model=f"maple:{BASE}", **more), {"base": base, "classes": names})


def with_words(model: Prompted) -> Prompted:
    """Its context set to the embeddings of the words that it stands for."""
    model.context.data.copy_(model.tower.token_embedding.weight[model.texts.initial])
    return model


def own_text(model: Prompted, texts: list[str]) -> Tensor:
    return model.base.clip.encode_text(model.base.tokenizer(texts), normalize=True)


SENTENCES = {
    "end": "a photo of a {}.",
    "middle": "a photo {} of a.",
    "front": "{} a photo of a.",
}


@pytest.mark.parametrize("custom", [False, True])
@pytest.mark.parametrize("position", SENTENCES)
@torch.no_grad()
def test_a_context_of_word_embeddings_is_the_sentence(position: str, custom: bool) -> None:
    model = with_words(prompted(phrase="a photo of a", name_position=position, config={"custom_text": custom}))
    said = [SENTENCES[position].format(name.replace("_", " ")) for name in NAMES]
    expected = own_text(model, said)
    assert torch.equal(model.classifier(NAMES), expected)
    torch.testing.assert_close(model.encode_text(model.class_tokens).embedding, expected)
    assert model.class_tokens.shape[1] < 24 == model.texts.length  # cut after the longest: nothing looks ahead
    assert torch.equal(model.encode_text(model.tokenizer(NAMES)).embedding, expected)


@torch.no_grad()
def test_a_random_context_is_m_tokens_before_the_name() -> None:
    model = prompted(context_tokens=5)
    assert model.context.shape == (5, 32) and 0.01 < model.context.std() < 0.03
    tokens = model.texts(["cat"])[0]
    start, end = model.base._tokenizer.sot_token_id, model.base._tokenizer.eot_token_id
    assert tokens[:9].tolist() == [start, -1, -2, -3, -4, -5, *model.base._tokenizer.encode("cat."), end]
    assert not tokens[9:].any()
    expected = own_text(model, ["X X X X X cat."])
    assert not torch.allclose(model.classifier(["cat"]), expected)
    assert torch.equal(with_words(model).classifier(["cat"]), expected)


@torch.no_grad()
def test_class_specific_contexts_are_each_its_classs_own() -> None:
    model = prompted(context_tokens=3, class_specific=True)
    assert model.context.shape == (9, 32)
    before = model.classifier(NAMES)
    model.context.data[3:6].normal_()  # of the second class
    changed = (model.classifier(NAMES) != before).any(1)
    assert changed.tolist() == [False, True, False]
    for names in (NAMES[:2], [*NAMES[:2], "dog"]):
        with pytest.raises(UsageError, match="the classes it was trained on only"):
            model.classifier(names)
    with pytest.raises(UsageError, match="the classes it was trained on only"):
        model.tokenizer(["a caption"])


def test_too_long_a_prompt_is_refused_and_a_caption_cut() -> None:
    with pytest.raises(
        UsageError, match="the prompt of 'dog' has 29 tokens, 25 of them context, and the model takes 24"
    ):
        prompted(names=["dog", "cat"], context_tokens=25)
    long = " ".join(["cat"] * 40)
    model = prompted(context_tokens=4)
    with pytest.raises(UsageError, match=r"has 47 tokens, 4 of them context"):
        model.texts([long])
    caption = model.tokenizer([long])[0]
    ids = model.base._tokenizer.encode("cat .")
    assert caption[1:5].tolist() == [-1, -2, -3, -4] and caption[5:22].tolist() == [ids[0]] * 17
    assert caption[22:].tolist() == [ids[1], model.base._tokenizer.eot_token_id]
    with pytest.raises(UsageError, match="has 4 tokens, so it cannot begin with 5 vectors"):
        prompted("maple", context_tokens=5, depth=1)


def appended(model: Maple, images: Tensor, tokens: Tensor, before: dict[int, Tensor]) -> Tensor:
    """The image tower with `tokens` (n, width) after the patches, `before[k]` in their place at block k; by hooks."""
    visual, hooks = copy.deepcopy(model.base.clip.visual), []

    def append(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (torch.cat([inputs[0], tokens.expand(len(inputs[0]), -1, -1)], 1),)

    hooks.append(visual.ln_pre.register_forward_pre_hook(append))
    for number, replaced in before.items():

        def replace(module: nn.Module, inputs: tuple[Tensor, ...], value: Tensor = replaced) -> tuple[Tensor, ...]:
            x = inputs[0].clone()
            x[:, -len(value) :] = value
            return (x,)

        visual.transformer.resblocks[number].register_forward_pre_hook(replace)
    return F.normalize(visual(images), dim=-1)


@torch.no_grad()
def test_maple_of_depth_1_with_a_zero_coupling_is_zero_tokens_appended() -> None:
    model = prompted("maple", depth=1)
    nn.init.zeros_(model.coupling.weight)
    nn.init.zeros_(model.coupling.bias)
    images = torch.randn(3, 3, 16, 16)
    expected = appended(model, images, torch.zeros(2, 32), {})
    assert torch.equal(model.encode_image(images).embedding, expected)
    assert not torch.allclose(model.base.encode_image(images).embedding, expected)
    assert torch.equal(with_words(model).classifier(["cat"]), own_text(model, ["a photo of a cat."]))


@torch.no_grad()
def test_maple_replaces_its_tokens_before_the_first_blocks() -> None:
    model = prompted("maple", depth=3)
    assert [p.shape for p in model.deep] == [(2, 32)] * 2 and len(model.deep_couplings) == 2
    assert torch.equal(model.deep_couplings[0].weight, model.deep_couplings[1].weight)  # copies of one initialisation
    assert not torch.equal(model.deep_couplings[0].weight, model.coupling.weight)
    images = torch.randn(3, 3, 16, 16)
    tokens = [couple(v) for couple, v in zip(model.deep_couplings, model.deep, strict=True)]
    expected = appended(model, images, model.coupling(model.context), {1: tokens[0], 2: tokens[1]})
    torch.testing.assert_close(model.encode_image(images).embedding, expected)

    with_words(model)
    clip = copy.deepcopy(model.base.clip)
    for number, vectors in enumerate(model.deep, start=1):

        def replace(module: nn.Module, inputs: tuple[Tensor, ...], value: Tensor = vectors) -> tuple[Tensor, ...]:
            x = inputs[0].clone()
            x[:, 1:3] = value  # after [SOS]
            return (x,)

        clip.transformer.resblocks[number].register_forward_pre_hook(replace)
    said = model.base.tokenizer([f"a photo of a {name.replace('_', ' ')}." for name in NAMES])
    torch.testing.assert_close(model.classifier(NAMES), clip.encode_text(said, normalize=True))


def test_maple_on_vit_b_16_has_as_many_parameters_as_published() -> None:
    """3.55 million with n = 2 and J = 9, from the widths 512 and 768; without building the towers."""
    couplings, vectors = 9 * (512 * 768 + 768), 9 * 2 * 512
    model = prompted("maple", depth=3)
    own = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert own == 3 * (32 * 32 + 32) + 3 * 2 * 32  # the same formula, J = 3 and widths of 32
    assert couplings + vectors == 3_555_072


@pytest.mark.parametrize("method", ["coop", "maple"])
def test_only_prompts_learn(method: str) -> None:
    more = {"config": {"vision_cfg": RESNET}} if method == "coop" else {"depth": 2}
    model = prompted(method, **more).train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    objective = objectives.build(ClassesOptions(), model)
    size = 32 if method == "coop" else 16
    batch = {
        "image": torch.randn(6, 3, size, size),
        "group_ids": torch.tensor([0, 1, 2, 2, 1, 0]),
        "index": torch.arange(6),
    }
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.0)
    losses = []
    for _ in range(5):
        parts = objective(model(batch), batch)
        optimizer.zero_grad()
        parts["loss"].backward()
        optimizer.step()
        losses.append(parts["loss"].item())
    assert losses[-1] < losses[0]
    changed = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    moved = {name for name, p in model.named_parameters() if p.requires_grad}
    assert changed == moved and not any(name.startswith("base.") for name in moved)
    if method == "coop":  # a ResNet's batch norm keeps its statistics
        assert any("running_mean" in name for name in before) and moved == {"context"}
    else:
        assert moved >= {"context", "deep.0", "coupling.weight", "deep_couplings.0.bias"}


def test_checkpointed_activations_give_the_same_gradients() -> None:
    batch = {"image": torch.randn(3, 3, 16, 16), "group_ids": torch.arange(3), "index": torch.arange(3)}
    gradients = []
    for checkpointing in (False, True):
        model = prompted("maple", depth=2, grad_checkpointing=checkpointing)
        objectives.build(ClassesOptions(), model)(model(batch), batch)["loss"].backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_the_loss_is_cross_entropy_over_all_classes() -> None:
    model = prompted(context_tokens=2)
    batch = {"image": torch.randn(4, 3, 16, 16), "group_ids": torch.tensor([2, 0, 1, 2]), "index": torch.arange(4)}
    parts = objectives.build(ClassesOptions(), model)(model(batch), batch)
    image, classes = model.base.clip.encode_image(batch["image"], normalize=True), model.classifier(NAMES)
    expected = F.cross_entropy(image @ classes.T / 0.07, batch["group_ids"])
    torch.testing.assert_close(parts["loss"], expected)
    with pytest.raises(UsageError, match="leave --mask-duplicates on"):
        del batch["group_ids"]
        objectives.build(ClassesOptions(), model)(model(batch), batch)


REFUSED = [
    ("coop", {"custom_text": True, "text_cfg": {**TINY_CLIP["text_cfg"], "pool_type": "last"}}, "reads pooling 'last'"),
    ("coop", {"custom_text": True, "text_cfg": {**TINY_CLIP["text_cfg"], "embed_cls": True}}, "reads a class token"),
    ("maple", {"vision_cfg": RESNET}, "MaPLe puts tokens into a ViT, and the image tower is a ModifiedResNet"),
    ("maple", {"vision_cfg": {**TINY_CLIP["vision_cfg"], "pool_type": "avg"}}, "the image tower has pooling 'avg'"),
    (
        "maple",
        {"vision_cfg": {**TINY_CLIP["vision_cfg"], "attentional_pool": True, "attn_pooler_heads": 2}},
        "the image tower has attention pooling",
    ),
]


@pytest.mark.parametrize(("method", "config", "message"), REFUSED)
def test_towers_that_are_read_otherwise_are_refused(method: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        prompted(method, config=config, context_tokens=2)


def test_other_refusals(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--depth 9, but the shallower tower has 3 blocks"):
        prompted("maple")
    with pytest.raises(UsageError, match="prompts are for open_clip models with weights"):
        Coop.new_recipe(CoopOptions(model="coop:conv"), Facts(class_names=NAMES))
    with pytest.raises(UsageError, match="the data have none"):
        Coop.new_recipe(CoopOptions(model=f"coop:{BASE}"), Facts())
    with pytest.raises(UsageError, match="prompts are learned for trained towers, and these are new"):
        prompted(context_tokens=2).load_pretrained()
    from cibr.models.conv import Conv, ConvOptions

    conv = Conv(ConvOptions(), Conv.new_recipe(ConvOptions(), Facts(["a cat"])))
    with pytest.raises(UsageError, match="--model coop:BASE, maple:BASE"):
        objectives.build(ClassesOptions(), conv)
    with pytest.raises(UsageError, match=f"--model coop:{BASE} is trained by --objective classes only"):
        objectives.build(objectives.options_type("clip")(), prompted(context_tokens=2))
