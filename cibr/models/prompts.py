"""Prompts learned for a frozen open_clip model: CoOp (2109.01134) and MaPLe (2210.03117).

    CoOp    t_c = f([SOS] v_1 ... v_M name_c . [EOS])      p(c | x) = softmax_c exp(scale) <g(x), t_c>
    MaPLe   the same with v (n, dt); before text blocks l = 1 ... J-1 the places of v hold P_l (n, dt);
            g sees n tokens more: W_0 v after the patches, before ln_pre; before image blocks l they become W_l P_l

Only v, P and W move; the towers stay in evaluation mode, so that batch norm keeps its statistics.  X of a tower with
prompts is what enters its projection, as without.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cibr.config import option
from cibr.errors import UsageError
from cibr.models.features import Batch, Features, Output
from cibr.models.model import Facts, Model, TemperatureOptions, features_of
from cibr.models.open_clip import OpenClip, OpenClipOptions, weights_of
from cibr.models.prompt_texts import PromptTexts

STD = 0.02  # of new vectors, in both papers
TEXTS_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True)
class PromptOptions(TemperatureOptions):
    temperature: Literal["learnable", "fixed"] = option("fixed", "of the logits")
    max_scale: float | None = option(None, "the scale is clamped to it after each step; None: never", above=0)
    grad_checkpointing: bool = option(False, "compute activations again in the backward, for memory")


@dataclass(frozen=True, kw_only=True)
class CoopOptions(PromptOptions):
    model: str = option("", "coop:BASE, learned context for the class names; BASE is open_clip:... with weights")
    context_tokens: int = option(16, "vectors of the context, unless --phrase says how many", least=1)
    phrase: str = option("", "start from the embeddings of these words, as in 'a photo of a'; default random")
    name_position: Literal["end", "middle", "front"] = option("end", "of the class name in the context")
    class_specific: bool = option(False, "a context for each class, which then works for these classes only")


@dataclass(frozen=True, kw_only=True)
class MapleOptions(PromptOptions):
    model: str = option("", "maple:BASE, prompts in both towers; BASE is an open_clip:... ViT with weights")
    context_tokens: int = option(2, "vectors of the context, of --phrase its first words", least=1)
    phrase: str = option("a photo of a", "start from the embeddings of its first words; '' for a random start")
    depth: int = option(9, "J: blocks whose prompts are learned, the first included", least=1)


class Prompted(Model):
    """Towers that do not move, and the vectors that do.

    `forward` gives the images of a batch and, in place of their texts, one row for each class; the objective is the
    cross-entropy over them.  The recipe has the base's own as "base" and the class names as "classes".
    """

    text_key = "classes"  # no texts are wanted of a batch
    image_prefix = "base.clip.visual."
    objective = "classes"
    class_tokens: Tensor  # (classes, length) int64 as encode_text takes them

    def __init__(self, options: Any, recipe: dict[str, Any]) -> None:
        super().__init__(options, recipe)
        self.base = OpenClip(OpenClipOptions(model=base_of(options.model)), recipe["base"]).requires_grad_(False)
        refuse_text_tower(self.tower, options.model)
        self.image_width, self.text_width = self.base.image_width, self.base.text_width
        self.embed_dim, self.notes = self.base.embed_dim, self.base.notes
        self.class_names: list[str] = recipe["classes"]
        self.texts = self.make_texts()
        tokens = self.texts(self.class_names, specific=self.is_specific)
        if self.tower.attn_mask is not None:  # nothing looks ahead, so what follows the last [EOS] is never seen
            tokens = tokens[:, : int(tokens.argmax(1).max()) + 1]
        self.register_buffer("class_tokens", tokens, persistent=False)
        self.context = nn.Parameter(torch.empty(self.vectors, self.tower.token_embedding.weight.shape[1]))
        nn.init.normal_(self.context, std=STD)
        self.train(self.training)

    @classmethod
    def new_recipe(cls, options: Any, facts: Facts) -> dict[str, Any]:
        if not facts.class_names:
            raise UsageError(f"--model {options.model} learns to tell classes apart, and the data have none")
        base = OpenClip.new_recipe(OpenClipOptions(model=base_of(options.model)), Facts(image_width=facts.image_width))
        return {"base": base, "classes": list(facts.class_names)}

    def load_pretrained(self) -> None:
        """The base's weights, and the words of the phrase.  Raises UsageError for a base without weights."""
        if weights_of(self.base.options.model) is None:
            raise UsageError(f"--model {self.options.model}: prompts are learned for trained towers, and these are new")
        self.base.load_pretrained()
        self.recipe = {**self.recipe, "base": self.base.recipe}
        if self.options.phrase:
            words = self.tower.token_embedding.weight[self.texts.initial]
            self.context.data.copy_(words.repeat(self.vectors // len(words), 1))

    def make_texts(self) -> PromptTexts:
        raise NotImplementedError

    @property
    def tower(self) -> Any:
        """The base's text tower, of which a CLIP has the parts as its own."""
        return getattr(self.base.clip, "text", self.base.clip)

    @property
    def is_specific(self) -> bool:
        return False

    @property
    def vectors(self) -> int:
        """Of the context: its places, for each class where it is class-specific."""
        return self.texts.places * (len(self.class_names) if self.is_specific else 1)

    def train(self, mode: bool = True) -> Prompted:
        super().train(mode)
        self.base.eval()
        return self

    def forward(self, batch: Batch) -> Output:
        """Images (n rows) and classes (as many rows as there are)."""
        return Output(self.encode_image(batch["image"]), self.encode_text(self.class_tokens), *self.logits())

    def encode_image(self, images: Tensor) -> Features:
        return self.base.encode_image(images)

    def encode_text(self, tokens: Tensor) -> Features:
        """(n, length) int64 with negative ids where the context stands; any length up to the model's."""
        tower = self.tower
        places = -1 - tokens  # of the context's vectors; negative for tokens
        dtype = tower.transformer.get_cast_dtype()
        x = tower.token_embedding(tokens.clamp(min=0)).to(dtype)
        x = placed(x, places, self.context) + tower.positional_embedding[: tokens.shape[1]].to(dtype)
        mask = tower.attn_mask
        mask = None if mask is None else mask[: tokens.shape[1], : tokens.shape[1]]
        x = tower.ln_final(self.through(tower.transformer, x, lambda k, x: self.before_text_block(k, x, places), mask))
        x = x[torch.arange(len(x), device=x.device), tokens.argmax(1)]  # at [EOS], the greatest id
        return features_of(x, self.base.project_text(x))

    def before_text_block(self, number: int, x: Tensor, places: Tensor) -> Tensor:
        return x

    def through(
        self, transformer: Any, x: Tensor, before: Callable[[int, Tensor], Tensor], mask: Tensor | None = None
    ) -> Tensor:
        """open_clip's transformer, with `before(number, x)` in front of each block."""
        for number, block in enumerate(transformer.resblocks):
            x = before(number, x)
            if self.options.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, None, None, mask, use_reentrant=False)
            else:
                x = block(x, attn_mask=mask)
        return x

    def classifier(self, class_names: Sequence[str]) -> Tensor:
        """(classes, d): any names with the context that was learned; those of training where it is class-specific."""
        if self.is_specific and list(class_names) != self.class_names:
            raise UsageError("a class-specific context works for the classes it was trained on only")
        tokens = self.texts(class_names, specific=self.is_specific).to(self.context.device)
        return torch.cat([self.encode_text(part).embedding for part in tokens.split(TEXTS_AT_ONCE)])

    def tokenizer(self, texts: list[str]) -> Tensor:
        """Captions in the place of class names; one too long loses its end."""
        if self.is_specific:
            raise UsageError("a class-specific context works for the classes it was trained on only")
        return self.texts(texts, cut=True)

    def transform(self, train: bool) -> Callable[[Any], Tensor]:
        """CoOp's in training: a crop of 8 to 100 % of the area, bicubic, mirrored at random."""
        evaluation = self.base.transform(False)
        if not train:
            return evaluation
        from torchvision.transforms import Compose, InterpolationMode, RandomHorizontalFlip, RandomResizedCrop

        crop = RandomResizedCrop(self.base.clip.visual.image_size, (0.08, 1.0), interpolation=InterpolationMode.BICUBIC)
        return Compose([crop, RandomHorizontalFlip(), evaluation])

    def temperature(self) -> tuple[nn.Parameter, nn.Parameter | None]:
        return self.base.temperature()


class Coop(Prompted):
    Options = CoopOptions

    def make_texts(self) -> PromptTexts:
        options = self.options
        places = None if options.phrase else options.context_tokens
        tokenizer = simple_tokenizer(self.base)
        return PromptTexts(tokenizer, phrase=options.phrase, places=places, position=options.name_position)

    @property
    def is_specific(self) -> bool:
        return self.options.class_specific


class Maple(Prompted):
    Options = MapleOptions

    def __init__(self, options: MapleOptions, recipe: dict[str, Any]) -> None:
        super().__init__(options, recipe)
        visual, tower = self.base.clip.visual, self.tower
        refuse_image_tower(visual, options.model)
        blocks = min(len(visual.transformer.resblocks), len(tower.transformer.resblocks))
        if options.depth > blocks:
            raise UsageError(f"--depth {options.depth}, but the shallower tower has {blocks} blocks")
        (places, width), image_width = self.context.shape, visual.transformer.width
        self.deep = nn.ParameterList(torch.empty(places, width) for _ in range(options.depth - 1))
        for vectors in self.deep:
            nn.init.normal_(vectors, std=STD)
        self.coupling = nn.Linear(width, image_width)
        one = nn.Linear(width, image_width)
        self.deep_couplings = nn.ModuleList(copy.deepcopy(one) for _ in self.deep)

    def make_texts(self) -> PromptTexts:
        return PromptTexts(simple_tokenizer(self.base), phrase=self.options.phrase, places=self.options.context_tokens)

    def encode_image(self, images: Tensor) -> Features:
        """images (n, 3, height, width) -> what enters the projection (n, width) and the embeddings (n, d), prompted."""
        visual, places = self.base.clip.visual, len(self.context)
        x = visual._embeds(images.to(visual.conv1.weight.dtype))  # (n, 1 + patches, width), after ln_pre

        def appended(vectors: Tensor) -> Tensor:
            return vectors.to(x.dtype).expand(len(x), -1, -1)

        def before(number: int, x: Tensor) -> Tensor:
            if not 0 < number <= len(self.deep):
                return x
            tokens = self.deep_couplings[number - 1](self.deep[number - 1])
            return torch.cat([x[:, :-places], appended(tokens)], 1)

        tokens = visual.ln_pre(self.coupling(self.context))  # a norm of each token alone: after the cat or before
        x = self.through(visual.transformer, torch.cat([x, appended(tokens)], 1), before)
        x = visual._pool(x)[0]
        return features_of(x, self.base.project_image(x))

    def before_text_block(self, number: int, x: Tensor, places: Tensor) -> Tensor:
        return placed(x, places, self.deep[number - 1]) if 0 < number <= len(self.deep) else x


def placed(x: Tensor, places: Tensor, vectors: Tensor) -> Tensor:
    """x (n, length, width) with vectors[places] where `places` (n, length) is not negative."""
    return torch.where((places >= 0)[..., None], F.embedding(places.clamp(min=0), vectors).to(x.dtype), x)


def base_of(model: str) -> str:
    """`coop:open_clip:ViT-B-16/FILE` -> `open_clip:ViT-B-16/FILE`.  UsageError for another kind of base."""
    base = model.partition(":")[2]
    if not base.startswith("open_clip:"):
        raise UsageError(
            f"--model {model}: prompts are for open_clip models with weights, as in open_clip:NAME/FILE or "
            "open_clip:local-dir:DIR; `cibr prompts` also takes the folder of a run"
        )
    return base


def simple_tokenizer(base: OpenClip) -> Any:
    """The base's tokenizer.  Raises UsageError for one whose pieces are not known to begin and end as CLIP's."""
    from open_clip.tokenizer import SimpleTokenizer

    base.tokenizer([""])
    if not isinstance(base._tokenizer, SimpleTokenizer):
        name = type(base._tokenizer).__name__
        raise UsageError(f"{base.options.model} has a {name}; prompts are for models with CLIP's own tokenizer")
    return base._tokenizer


def refuse_text_tower(tower: Any, model: str) -> None:
    """Raises UsageError unless the tower is a transformer of open_clip's that is read at the end of the text."""
    if not hasattr(tower, "token_embedding"):
        raise UsageError(
            f"--model {model}: the text tower is a {type(tower).__name__}, which takes no vectors as words"
        )
    pool = getattr(tower, "pool_type", None) or tower.text_pool_type
    if pool != "argmax" or getattr(tower, "cls_emb", None) is not None or getattr(tower, "use_pad_mask", False):
        kind = "a class token" if getattr(tower, "cls_emb", None) is not None else f"pooling {pool!r}"
        raise UsageError(f"--model {model}: the text tower reads {kind}, and prompts need the token at the end of text")


def refuse_image_tower(visual: Any, model: str) -> None:
    """Raises UsageError unless the tower is a ViT of open_clip's that is read at its class token."""
    from open_clip.transformer import VisionTransformer

    if not isinstance(visual, VisionTransformer):
        raise UsageError(
            f"--model {model}: MaPLe puts tokens into a ViT, and the image tower is a {type(visual).__name__}; "
            "coop learns prompts for the text tower alone"
        )
    if visual.attn_pool is not None or visual.pool_type != "tok":
        kind = "attention pooling" if visual.attn_pool is not None else f"pooling {visual.pool_type!r}"
        raise UsageError(
            f"--model {model}: the image tower has {kind}, and MaPLe needs one that is read at its class token"
        )
