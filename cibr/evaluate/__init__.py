"""What a model can do: zero-shot classification, retrieval, probes and information, each a function of features alone.

zero_shot.py    class embeddings by prompts; top-1, top-5, mean per class
retrieval.py    R@1, R@5, R@10 both ways, several captions an image
probes.py       linear and noisy probes, share of variance, neighbours, CKA
information.py  estimates of mutual information on rows the critics never saw
emoji.py        the splits of an emoji run: held-out vendor, unseen concepts, vendor probe
"""

from __future__ import annotations

from cibr.evaluate.emoji import embed, evaluate, evaluation_groups, recalls, style_probe, table

__all__ = ["embed", "evaluate", "evaluation_groups", "recalls", "style_probe", "table"]
