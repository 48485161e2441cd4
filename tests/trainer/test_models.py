"""Models: X is what enters the projection, whatever the tower; specs, locks and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import CONV, TINY_CLIP, tiny_clip
from torch import Tensor, nn
from torch.nn import functional as F

from cibr import models
from cibr.errors import UsageError
from cibr.models.conv import ConvOptions
from cibr.models.heads import HeadsOptions
from cibr.models.open_clip import IDENTITY, OpenClip, OpenClipOptions
from cibr.models.text import Vocabulary

TIMM = {"timm_model_name": "test_resnet", "timm_pool": "avg", "timm_proj": "linear", "image_size": 32}
RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16, "patch_size": None}


def built(folder: Path, **parts: Any) -> OpenClip:
    torch.manual_seed(0)
    model = models.build(OpenClipOptions(model=tiny_clip(folder, **parts)))
    assert isinstance(model, OpenClip)
    return model.eval()


def vision(**more: Any) -> dict[str, Any]:
    return {
        "vision_cfg": more if "timm_model_name" in more or "layers" in more else {**TINY_CLIP["vision_cfg"], **more}
    }


def text(custom: bool = True, **more: Any) -> dict[str, Any]:
    return {"custom_text": custom, "text_cfg": {**TINY_CLIP["text_cfg"], **more}}


def caught(module: nn.Module, call: Callable[[], object], *, entering: bool = False) -> Tensor:
    """What leaves (or enters) `module` during `call`."""
    found: list[Tensor] = []
    if entering:
        hook = module.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    else:
        hook = module.register_forward_hook(lambda *parts: found.append(parts[2]))
    call()
    hook.remove()
    return found[-1]


TOWERS = {  # configuration, and what enters the projection in a run of open_clip's own
    "vit": (vision(), lambda v, run: caught(v.ln_post, run)[:, 0]),
    "vit, mean of patches": (vision(pool_type="avg"), lambda v, run: caught(v.ln_post, run)[:, 1:].mean(1)),
    "vit, norm last": (vision(final_ln_after_pool=True), lambda v, run: caught(v.ln_post, run)),
    "timm, linear": (vision(**TIMM), lambda v, run: caught(v.head.proj, run, entering=True)),
    "timm, mlp": (vision(**{**TIMM, "timm_proj": "mlp"}), lambda v, run: caught(v.head.mlp, run, entering=True)),
    "timm, classifier": (
        vision(**{**TIMM, "timm_proj": ""}),
        lambda v, run: caught(v.trunk.get_classifier(), run, entering=True),
    ),
    "timm vit": (
        vision(**{**TIMM, "timm_model_name": "test_vit", "timm_pool": "token", "image_size": 160}),
        lambda v, run: caught(v.head.proj, run, entering=True),
    ),
}


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_x_is_what_enters_the_image_projection(tmp_path: Path, name: str) -> None:
    parts, expected = TOWERS[name]
    model = built(tmp_path, **parts)
    size = model.clip.visual.image_size
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    images = torch.randn(3, 3, height, width)
    features = model.encode_image(images)
    own = model.clip.encode_image(images)
    torch.testing.assert_close(features.inputs, expected(model.clip.visual, lambda: model.clip.encode_image(images)))
    torch.testing.assert_close(features.embedding, F.normalize(own, dim=-1))
    assert features.inputs.shape[1] == model.image_width and features.embedding.shape[1] == model.embed_dim == 16
    assert not model.notes


@torch.no_grad()
def test_x_of_a_resnet_is_what_enters_its_c_proj(tmp_path: Path) -> None:
    """Which is a function's argument, not a module's: with the identity for it open_clip's own embedding is X."""
    model = built(tmp_path, **vision(**RESNET))
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(
        model.encode_image(images).embedding, model.clip.encode_image(images, normalize=True), rtol=1e-5, atol=1e-6
    )
    x = model.encode_image(images).inputs
    pool = model.clip.visual.attnpool
    pool.c_proj.weight = nn.Parameter(torch.eye(x.shape[1]))
    pool.c_proj.bias = nn.Parameter(torch.zeros(x.shape[1]))
    torch.testing.assert_close(x, model.clip.encode_image(images), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "parts",
    [
        text(custom=False),
        text(),
        text(proj_bias=True),
        text(no_causal_mask=True, pool_type="last"),
        text(embed_cls=True),
        text(no_causal_mask=True, pool_type="first"),
    ],
)
@torch.no_grad()
def test_x_is_what_enters_the_text_projection(tmp_path: Path, parts: dict[str, Any]) -> None:
    model = built(tmp_path, **parts)
    tokens = model.tokenizer(["a red circle", "blue"])
    tower = getattr(model.clip, "text", model.clip)
    features, own = model.encode_text(tokens), model.clip.encode_text(tokens)
    w = tower.text_projection
    projected = w(features.inputs) if isinstance(w, nn.Linear) else features.inputs @ w
    torch.testing.assert_close(projected, own)  # w is injective on these: 32 numbers from a random 32 x 16 matrix
    normed = caught(tower.ln_final, lambda: model.clip.encode_text(tokens))
    rows = normed if normed.ndim == 2 else normed.flatten(0, 1)
    for x in features.inputs:
        assert torch.cdist(x[None], rows).min() < 1e-5  # one of the positions after the last norm
    torch.testing.assert_close(features.embedding, F.normalize(own, dim=-1))


@torch.no_grad()
def test_towers_without_a_projection_are_their_own_x(tmp_path: Path) -> None:
    model = built(tmp_path, embed_dim=32, **text(proj_type="none"))
    tokens = model.tokenizer(["a red circle", "blue"])
    features = model.encode_text(tokens)
    torch.testing.assert_close(features.inputs, model.clip.encode_text(tokens))
    assert model.notes == (IDENTITY.format("text"),)
    timm = built(tmp_path, embed_dim=96, **vision(**{**TIMM, "timm_proj": "none"}))
    assert timm.notes == (IDENTITY.format("image"),) and timm.image_width == 96
    with pytest.raises(UsageError, match="images become 96 numbers and texts 16"):
        built(tmp_path, **vision(**{**TIMM, "timm_proj": "none"}))


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A Hugging Face text tower and its tokenizer, in a folder."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "bert"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "circle"]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    settings = transformers.BertConfig(
        vocab_size=len(words), hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    transformers.BertModel(settings, add_pooling_layer=False).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("projection", ["linear", "mlp"])
@torch.no_grad()
def test_x_of_a_hugging_face_tower(tmp_path: Path, bert: Path, projection: str) -> None:
    own = {"hf_model_name": str(bert), "hf_tokenizer_name": str(bert), "hf_proj_type": projection}
    model = built(tmp_path, text_cfg={**own, "hf_pooler_type": "mean_pooler", "context_length": 12})
    tokens = model.tokenizer(["a red circle", "blue"])
    features = model.encode_text(tokens)
    entering = caught(model.clip.text.proj, lambda: model.clip.encode_text(tokens), entering=True)
    torch.testing.assert_close(features.inputs, entering)
    torch.testing.assert_close(features.embedding, model.clip.encode_text(tokens, normalize=True))
    assert model.text_width == 24


@torch.no_grad()
def test_conv_and_heads_keep_what_enters_their_projections() -> None:
    conv = models.build(ConvOptions(**CONV), models.Facts(["a red circle", "blue"])).eval()
    heads = models.build(HeadsOptions(head_hidden=7, embed_dim=5), models.Facts((), 6, 4)).eval()
    for model, image, tokens in (
        (conv, torch.rand(4, 3, 16, 16), conv.tokenizer(["blue"] * 4)),
        (heads, torch.randn(4, 6), torch.randn(4, 4)),
    ):
        output = model({model.image_key: image, model.text_key: tokens})
        for features, projection in ((output.image, model.image_projection), (output.text, model.text_projection)):
            torch.testing.assert_close(features.embedding, F.normalize(features.inputs @ projection.weight.T, dim=1))
        assert output.image.inputs.shape == (4, model.image_width)
        assert output.text.inputs.shape == (4, model.text_width)


def test_an_unseen_word_is_spelled() -> None:
    vocabulary = Vocabulary.of(["a red circle", "blue"], 12)
    end, pieces = len(vocabulary) - 1, vocabulary._tokenizer
    known, empty = vocabulary(["blue", ""]).tolist()
    assert known == [1, vocabulary.bpe_ids.index(pieces.encode("blue")[0]) + 2, end, *[0] * 9]
    assert empty == [1, end, *[0] * 10]
    for word in ("zebra", "abacus", "redcircles", "naïve", "\N{GRINNING FACE}"):
        ids = [own for own in vocabulary([word])[0].tolist() if own not in (0, 1, end)]
        spelled = "".join(pieces.decoder[vocabulary.bpe_ids[own - 2]] for own in ids)
        assert spelled == "".join(pieces.decoder[piece] for piece in pieces.encode(word)) and len(ids) > 1
    assert len({tuple(row.tolist()) for row in vocabulary(["zebra", "abacus", "abacas", ""])}) == 4
    out = Vocabulary.of(["out"], 12)
    assert len(out(["about"])[0].nonzero()) == 5  # start, a, b, out, end: known pieces stay whole
    assert vocabulary(["a red circle " * 9])[0, -1] == end  # too long: the end is kept


def test_a_vocabulary_without_letters_leaves_unseen_words_out() -> None:
    """As the runs of version 0.1 were trained and evaluated."""
    old = Vocabulary(set(Vocabulary.of(["a red circle"], 6).bpe_ids) - set(range(512)), 6)
    assert old(["zebra red"]).tolist() == [old(["red"])[0].tolist()]


def test_weights_come_from_files_and_folders(tmp_path: Path) -> None:
    first = built(tmp_path)
    torch.save(first.clip.state_dict(), tmp_path / "weights.pt")
    from cibr.models.open_clip import split_spec, weights_of

    assert split_spec("open_clip:ViT-B-32//folder/file.pt") == ("ViT-B-32", "/folder/file.pt")
    assert split_spec("open_clip:ViT-B-32/laion2b_s34b_b79k") == ("ViT-B-32", "laion2b_s34b_b79k")
    assert weights_of(f"open_clip:RN50/{tmp_path / 'weights.pt'}") == tmp_path / "weights.pt"
    with pytest.raises(UsageError, match="is no file and no tag of RN50, whose tags are openai"):
        weights_of("open_clip:RN50/openia")
    with pytest.raises(UsageError, match=r"weights.pt holds no weights of open_clip:RN50"):
        models.build(OpenClipOptions(model=f"open_clip:RN50/{tmp_path / 'weights.pt'}"))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("ViT-B-32", "did you mean open_clip:ViT-B-32"),
        ("open_clip:ViT-B-33", "no model 'ViT-B-33'; near it are .*ViT-B-32"),
        ("open_clip:missing.json", "missing.json cannot be read"),
        ("open_clip:local-dir:nowhere", "nowhere/open_clip_config.json cannot be read"),
        ("open_clip:coca_ViT-B-32", "is CoCa"),
    ],
)
def test_specs_that_cannot_be_met(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        models.build(models.options_type(spec)(model=spec))


def test_a_configuration_that_open_clip_cannot_make(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text(json.dumps({**TINY_CLIP, "vision_cfg": {"colour": "blue"}}))
    with pytest.raises(UsageError, match="open_clip cannot make"):
        models.build(OpenClipOptions(model=f"open_clip:{tmp_path / 'bad.json'}"))
    (tmp_path / "bad.json").write_text(json.dumps({"embed_dim": 3}))
    with pytest.raises(UsageError, match=r"bad.json lacks text_cfg, vision_cfg"):
        models.build(OpenClipOptions(model=f"open_clip:{tmp_path / 'bad.json'}"))
