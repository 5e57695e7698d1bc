"""Metrics of texts that a model writes, by the packages that define them, which are imported where they are used.

BLEU (Papineni et al. 2002) and chrF2 (Popovic 2015) are sacrebleu's, from 0 to 100, over the whole split: its "13a"
tokens, mixed case. ROUGE (Lin 2004) is rouge-score's mean F-measure, from 0 to 1, of Porter's stems; in `rougeLsum`
each line is a sentence.

Predictions are texts; references are the right texts of each, one or more. Of several BLEU and chrF take each as they
define it, ROUGE the one that fits best.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType

from smidgen.common.errors import DataError
from smidgen.data.metrics import Metric

Texts = Sequence[str]
RightTexts = Sequence[Sequence[str]]


def sacrebleu() -> ModuleType:
    """The module sacrebleu. Raises DataError if it is not installed."""
    try:
        import sacrebleu as module
    except ImportError as error:
        raise DataError("bleu and chrf are computed by sacrebleu: pip install 'smidgen[text]'") from error
    return module


def rouge_scorer() -> ModuleType:
    """The module rouge_score.rouge_scorer. Raises DataError if it is not installed."""
    try:
        from rouge_score import rouge_scorer as module
    except ImportError as error:
        raise DataError("ROUGE is computed by rouge-score: pip install 'smidgen[text]'") from error
    found: ModuleType = module
    return found


def bleu(predictions: Texts, references: RightTexts) -> float:
    """BLEU of the whole split, up to four words, 0 to 100."""
    return float(sacrebleu().corpus_bleu(list(predictions), _by_number(references)).score)


def chrf(predictions: Texts, references: RightTexts) -> float:
    """chrF2 of the whole split, up to six characters, 0 to 100."""
    return float(sacrebleu().corpus_chrf(list(predictions), _by_number(references)).score)


def rouge(name: str) -> Callable[[Texts, RightTexts], float]:
    """The mean F-measure of one of rouge-score's scores."""

    def compute(predictions: Texts, references: RightTexts) -> float:
        scorer = rouge_scorer().RougeScorer([name], use_stemmer=True)
        pairs = zip(predictions, references, strict=True)
        found = [scorer.score_multi(list(right), said)[name].fmeasure for said, right in pairs]
        return float(sum(found) / len(found))

    return compute


def _by_number(references: RightTexts) -> list[list[str | None]]:
    """First references of all examples, then second ones, ...; None where an example has fewer."""
    most = max(map(len, references))
    return [[right[i] if i < len(right) else None for right in references] for i in range(most)]


BLEU = Metric("bleu", bleu, package=sacrebleu)
CHRF = Metric("chrf", chrf, package=sacrebleu)
ROUGE = tuple(Metric(name, rouge(name), package=rouge_scorer) for name in ("rouge1", "rouge2", "rougeL", "rougeLsum"))
