"""The study: why does a nearest-neighbour language model work *here*, on your model and corpus?

    knnlm study run MODEL --train CORPUS --valid CORPUS --test CORPUS --out DIR
    knnlm study list
    knnlm study report DIR

In Python: `run(Study(model, tokenizer, train=…, valid=…, test=…, folder=…))`, `report(folder)`.

Adding an experiment is adding a file, `study/experiments/NAME.py`, with a function of that name:

    def my_question(study: Study) -> Outcome:
        '''Its title, in a few words.

        Row: 18                      (order in the report; the paper's rows are 1 to 17)

        Section: 5                   (of the paper)

        Hypothesis: what is asked.

        Finding: what the paper found, with its numbers.
        '''

and, if it takes long, `cost(study)`: seconds on two cores. Nothing is registered anywhere.

- Ask `study` for what is made once and kept: `study.text("train")`, `study.store("att")` (keys and
  values, to train heads on), `study.evaluation("valid")` (log-probabilities, tokens, and the states
  of every layer; of another model on the same tokens with `model=`), `retrieval.scores(study,
  "test", layer=…, metric=…)` (kNN, as TokenScores) and `retrieval.with_memory(evaluation,
  log_probs)` (any other memory, as TokenScores).
- Keep what is expensive by `study.keep(kind, name, inputs, make)`: `inputs` are plain data, all
  that the result depends on (digests of the store or the model, seeds, budgets); `make(path)`
  writes a file or a folder there. It is made once, whatever is killed when.
- `measure(name, valid, test)` fits λ, t and k on valid and applies them to test; `.row()` is the
  row of results. `against(study, a, b)` is the ratio of two perplexities on test with its
  confidence interval; without b it is against the model alone.
- Budgets are `study.settings`: `head_tokens` and `lm_tokens` bound training, `seed` seeds it.
- Return an `Outcome`: rows (plain data, one per setting), plots (numbers; the report draws them), a
  verdict and one sentence that gives the numbers. "holds" and "does not hold" are for what the
  confidence intervals decide; the rest is "not decidable at this size".
  `verdicts` judges a finding clause by clause and names those that fail; `comparisons` of the
  outcome are the ratios and intervals that decide.
- Give it a test on a toy case whose answer is known by hand.
"""

from __future__ import annotations

from knnlm_hf.study.bootstrap import Comparison, compare
from knnlm_hf.study.catalogue import Experiment, all_experiments
from knnlm_hf.study.measure import Measured, against, measure
from knnlm_hf.study.outcome import Outcome, Plot, Series
from knnlm_hf.study.report import report
from knnlm_hf.study.runner import run
from knnlm_hf.study.settings import QUICK, Settings
from knnlm_hf.study.study import Study

__all__ = [
    "QUICK",
    "Comparison",
    "Experiment",
    "Measured",
    "Outcome",
    "Plot",
    "Series",
    "Settings",
    "Study",
    "against",
    "all_experiments",
    "compare",
    "measure",
    "report",
    "run",
]
