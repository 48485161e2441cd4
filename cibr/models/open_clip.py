"""Any open_clip model, with what enters its projections.

    tower                         X                                   projection
    ViT, CLIP's and Custom text   pooled after the last layer norm    a matrix or a linear map; none: the identity
    ModifiedResNet                heads of the attention pooling      its c_proj
    timm                          what enters the head's projection   linear, MLP, the trunk's classifier; or identity
    Hugging Face text             after the pooler                    linear, MLP or identity

The recipe is open_clip's own configuration (`model_cfg` and `preprocess_cfg`, as a `local-dir` holds it), so that a
checkpoint can be loaded where the file or folder it began from is gone.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cibr.config import option
from cibr.errors import UsageError
from cibr.models.features import Features
from cibr.models.model import SPECS, Facts, Model, TemperatureOptions, features_of

Encode = Callable[[Tensor], Tensor]
IDENTITY = "the {} tower has no projection: X is its pooled output and the projection the identity"


@dataclass(frozen=True, kw_only=True)
class OpenClipOptions(TemperatureOptions):
    model: str = option("", SPECS)
    lock_image: bool = option(False, "train the text tower only (LiT); --unlock-image leaves some of it free")
    lock_text: bool = option(False, "train the image tower only")
    unlock_image: int = option(
        0, "with --lock-image: groups of layers to leave free, counted from the projection", least=0
    )
    unlock_text: int = option(0, "with --lock-text: the same", least=0)
    grad_checkpointing: bool = option(False, "compute activations again in the backward, for memory")
    patch_dropout: float | None = option(
        None, "share of patches left out in training; default the model's", least=0, below=1
    )


class OpenClip(Model):
    Options = OpenClipOptions
    image_prefix = "clip.visual."

    def __init__(self, options: OpenClipOptions, recipe: dict[str, Any]) -> None:
        super().__init__(options, recipe)
        import open_clip

        with tempfile.TemporaryDirectory() as folder:  # open_clip builds a configuration from a file only
            (Path(folder) / "open_clip_config.json").write_text(json.dumps(recipe))
            try:
                with quiet():
                    self.clip = open_clip.create_model(
                        f"local-dir:{folder}", load_weights=False, pretrained_text=recipe["pretrained_text"]
                    )
            except (RuntimeError, OSError, ValueError, KeyError, TypeError, AssertionError) as error:
                raise UsageError(f"open_clip cannot make {options.model}: {error}") from error
        if hasattr(self.clip, "text_decoder"):
            raise UsageError(f"{options.model} is CoCa, whose captioning loss is not part of any objective here")
        self._image_inputs, self.project_image, image_identity = image_parts(self.clip.visual)
        self._text_inputs, self.project_text, text_identity = text_parts(self.clip)
        self.notes = tuple(IDENTITY.format(n) for n, i in (("image", image_identity), ("text", text_identity)) if i)
        self._lock()
        if options.grad_checkpointing:
            self.clip.set_grad_checkpointing()
        self.image_width, self.text_width, self.embed_dim = self._widths()

    @classmethod
    def new_recipe(cls, options: OpenClipOptions, facts: Facts) -> dict[str, Any]:
        if facts.image_width is not None:
            raise UsageError(
                "open_clip models take images, but the data are cached features; --model heads takes those"
            )
        recipe = configuration(options)
        if (
            facts.logit_bias is not None and "init_logit_bias" not in recipe["model_cfg"]
        ):  # as open_clip's --siglip does
            start = {"init_logit_bias": facts.logit_bias, "init_logit_scale": math.log(facts.logit_scale)}
            recipe["model_cfg"] |= start
        return {**recipe, "pretrained_text": True}

    def load_pretrained(self) -> None:
        import open_clip

        self.recipe = {**self.recipe, "pretrained_text": False}  # what is loaded from here on holds every weight
        path = weights_of(self.options.model)
        if path is None:
            return
        try:
            with quiet():
                open_clip.load_checkpoint(self.clip, str(path))
        except (RuntimeError, OSError, ValueError, KeyError, AssertionError) as error:
            raise UsageError(f"{path} holds no weights of {self.options.model}: {error}") from error

    def encode_image(self, images: Tensor) -> Features:
        inputs = self._image_inputs(images.to(dtype_of(self.clip.visual)))
        return features_of(inputs, self.project_image(inputs))

    def encode_text(self, tokens: Tensor) -> Features:
        inputs = self._text_inputs(tokens)
        return features_of(inputs, self.project_text(inputs))

    def temperature(self) -> tuple[nn.Parameter, nn.Parameter | None]:
        return self.clip.logit_scale, self.clip.logit_bias

    def transform(self, train: bool) -> Callable[[Any], Tensor]:
        import open_clip

        settings = open_clip.transform.PreprocessCfg(**open_clip.get_model_preprocess_cfg(self.clip))
        return open_clip.transform.image_transform_v2(settings, is_train=train)

    def tokenizer(self, texts: list[str]) -> Tensor:
        if not hasattr(self, "_tokenizer"):
            self._tokenizer = tokenizer_of(self.recipe)
        return self._tokenizer(texts)

    def _lock(self) -> None:
        if self.options.lock_image:
            self.clip.lock_image_tower(self.options.unlock_image, freeze_bn_stats=True)
        if self.options.lock_text:
            self.clip.lock_text_tower(self.options.unlock_text)

    @torch.no_grad()
    def _widths(self) -> tuple[int, int, int]:
        """Of X and Z, by a batch of one."""
        size, training = self.clip.visual.image_size, self.training
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        self.eval()
        image = self.encode_image(torch.zeros(1, 3, height, width))
        text = self.encode_text(torch.ones(1, self.clip.context_length, dtype=torch.int64))
        self.train(training)
        if image.embedding.shape != text.embedding.shape:
            raise UsageError(
                f"{self.options.model}: images become {image.embedding.shape[1]} numbers and texts "
                f"{text.embedding.shape[1]}; embed_dim in its configuration fits one of them only"
            )
        return image.inputs.shape[1], text.inputs.shape[1], image.embedding.shape[1]


def image_parts(visual: nn.Module) -> tuple[Encode, Encode, bool]:
    """images -> X, X -> X W of an image tower, and whether W is the identity.  UsageError for an unknown tower."""
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer

    if isinstance(visual, VisionTransformer):
        return (
            lambda images: visual._pool(visual.transformer(visual._embeds(images)))[0],
            lambda x: x if visual.proj is None else x @ visual.proj,
            visual.proj is None,
        )
    if isinstance(visual, ModifiedResNet):
        return lambda images: attention_heads(visual, images), visual.attnpool.c_proj, False
    if isinstance(visual, TimmModel):
        return timm_parts(visual)
    raise UsageError(
        f"the image tower is a {type(visual).__name__}, of which it is not known what enters its projection"
    )


def timm_parts(visual: Any) -> tuple[Encode, Encode, bool]:
    """The head's `proj` or `mlp` is the projection; without them the trunk's classifier, where it has one."""
    *before, last = visual.head.named_children() if len(visual.head) else [("", nn.Identity())]
    if last[0] in ("proj", "mlp"):
        pool = nn.Sequential(*(module for _, module in before))
        return lambda images: pool(visual.trunk(images)), last[1], False
    classifier = visual.trunk.get_classifier()
    if len(visual.head) or isinstance(classifier, nn.Identity):
        return visual, nn.Identity(), True

    def inputs(images: Tensor) -> Tensor:
        return visual.trunk.forward_head(visual.trunk.forward_features(images), pre_logits=True)

    return inputs, classifier, False


def attention_heads(visual: Any, images: Tensor) -> Tensor:
    """(n, width): the heads of a ModifiedResNet's attention pooling, which its `c_proj` projects."""
    pool = visual.attnpool
    for layer in (visual.stem, visual.layer1, visual.layer2, visual.layer3, visual.layer4):
        images = layer(images)
    x = images.flatten(2).transpose(1, 2)  # (n, positions, width)
    x = torch.cat([x.mean(1, keepdim=True), x], 1) + pool.positional_embedding.to(x.dtype)
    query, key, value = (
        part.unflatten(-1, (pool.num_heads, -1)).transpose(1, 2)
        for part in (pool.q_proj(x[:, :1]), pool.k_proj(x), pool.v_proj(x))
    )
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(1)


def text_parts(clip: Any) -> tuple[Encode, Encode, bool]:
    """tokens -> X, X -> X W of a text tower, and whether W is the identity.  UsageError for an unknown tower."""
    from open_clip.hf_model import HFTextEncoder
    from open_clip.transformer import TextTransformer

    tower = getattr(clip, "text", clip)  # CLIP itself keeps the parts of a TextTransformer as its own
    if isinstance(tower, HFTextEncoder):
        return partial(hugging_face_inputs, tower), tower.proj, isinstance(tower.proj, nn.Identity)
    if tower is not clip and not isinstance(tower, TextTransformer):
        name = type(tower).__name__
        raise UsageError(f"the text tower is a {name}, of which it is not known what enters its projection")

    def project(x: Tensor) -> Tensor:
        w = tower.text_projection
        return x if w is None else w(x) if isinstance(w, nn.Linear) else x @ w

    inputs = partial(clip_inputs if tower is clip else transformer_inputs, tower)
    return inputs, project, tower.text_projection is None


def clip_inputs(clip: Any, tokens: Tensor) -> Tensor:
    """X of a CLIP, whose text tower is in parts."""
    from open_clip.transformer import text_global_pool

    dtype = clip.transformer.get_cast_dtype()
    x = clip.token_embedding(tokens).to(dtype) + clip.positional_embedding.to(dtype)
    x = clip.ln_final(clip.transformer(x, attn_mask=clip.attn_mask))
    return text_global_pool(x, tokens, clip.text_pool_type, eos_token_id=clip.text_eos_id)


def transformer_inputs(text: Any, tokens: Tensor) -> Tensor:
    """X of a TextTransformer."""
    from open_clip.transformer import text_global_pool

    x, mask = text._embeds(tokens)
    x = text.transformer(x, attn_mask=mask)
    if text.cls_emb is not None:
        return text.ln_final(text_global_pool(x, pool_type="last"))
    return text_global_pool(text.ln_final(x), tokens, text.pool_type, eos_token_id=text.eos_id)


def hugging_face_inputs(text: Any, tokens: Tensor) -> Tensor:
    """X of a Hugging Face tower."""
    mask = (tokens != text.config.pad_token_id).long()
    return text.pooler(text.transformer(input_ids=tokens, attention_mask=mask), mask)


def split_spec(model: str) -> tuple[str, str]:
    """`open_clip:NAME/TAG_OR_FILE` -> NAME, TAG_OR_FILE; `local-dir:DIR` and `FILE.json` are names without either."""
    name = model.removeprefix("open_clip:")
    if name.startswith("local-dir:") or name.endswith(".json"):
        return name, ""
    name, _, weights = name.partition("/")
    return name, weights


def configuration(options: OpenClipOptions) -> dict[str, Any]:
    """What the model's `open_clip_config.json` would hold, and where its tokenizer is.  UsageError for no such one."""
    import open_clip

    name, tag = split_spec(options.model)
    preprocess, tokenizer = {}, None
    if name.startswith("local-dir:") or name.endswith(".json"):
        path = Path(name) if name.endswith(".json") else Path(name.removeprefix("local-dir:")) / "open_clip_config.json"
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UsageError(f"--model {options.model}: {path} cannot be read: {error}") from error
        config = found.get("model_cfg", found)
        preprocess = found.get("preprocess_cfg", {})
        tokenizer = str(path.parent.resolve()) if "model_cfg" in found else None
        if missing := {"embed_dim", "vision_cfg", "text_cfg"} - set(config):
            raise UsageError(f"--model {options.model}: {path} lacks {', '.join(sorted(missing))}")
    else:
        config = copy.deepcopy(open_clip.get_model_config(name))
        if config is None:
            near = [known for known in open_clip.list_models() if known.lower().startswith(name.lower()[:5])]
            raise UsageError(f"open_clip has no model {name!r}; near it are {', '.join(near) or 'none'}")
        preprocess = open_clip.get_pretrained_cfg(name, tag) if tag else {}
    if options.patch_dropout is not None:
        config["vision_cfg"]["patch_dropout"] = options.patch_dropout
    preprocess = open_clip.transform.merge_preprocess_dict({}, preprocess or {})
    return {"model_cfg": config, "preprocess_cfg": preprocess, "tokenizer": tokenizer}


def weights_of(model: str) -> Path | None:
    """The file of a model's pretrained weights, downloaded where they have a tag.  UsageError for what is not there."""
    import open_clip

    name, weights = split_spec(model)
    if name.startswith("local-dir:"):
        found = open_clip.factory._find_checkpoint_in_dir(Path(name.removeprefix("local-dir:")))
        if found is None:
            raise UsageError(f"--model {model}: the folder holds no open_clip_model.safetensors")
        return Path(found)
    if not weights:
        return None
    tagged = open_clip.get_pretrained_cfg(name, weights)
    if not tagged:
        if Path(weights).is_file():
            return Path(weights)
        known = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise UsageError(f"--model {model}: {weights!r} is no file and no tag of {name}, whose tags are {known}")
    try:
        return Path(open_clip.download_pretrained(tagged))
    except Exception as error:  # whatever the download's many libraries raise
        raise UsageError(f"--model {model}: the weights cannot be downloaded: {error}") from error


def tokenizer_of(recipe: dict[str, Any]) -> Callable[[list[str]], Tensor]:
    """open_clip's tokenizer for a configuration."""
    from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH, HFTokenizer, SimpleTokenizer

    text = recipe["model_cfg"]["text_cfg"]
    length, more = text.get("context_length", DEFAULT_CONTEXT_LENGTH), text.get("tokenizer_kwargs", {})
    if not text.get("hf_tokenizer_name"):
        return SimpleTokenizer(context_length=length, **more)
    source = recipe["tokenizer"] or text["hf_tokenizer_name"]
    try:
        return HFTokenizer(source, context_length=length, tokenizer_mode=text.get("tokenizer_mode"), **more)
    except Exception as error:  # whatever transformers raises for what it cannot find or download
        raise UsageError(f"the tokenizer {source} cannot be loaded: {error}") from error


def dtype_of(module: nn.Module) -> torch.dtype:
    return next(p.dtype for p in module.parameters() if p.is_floating_point())


class quiet:
    """No warnings of open_clip's about weights that are loaded later."""

    def __enter__(self) -> None:
        self.before = logging.root.manager.disable
        logging.disable(logging.WARNING)

    def __exit__(self, *error: object) -> None:
        logging.disable(self.before)
