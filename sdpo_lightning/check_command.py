"""Rank 9: the verb `check`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lightning.pytorch.cli import LightningArgumentParser

from sdpo_lightning.check_run import review
from sdpo_lightning.cli import EstimateCLI
from sdpo_lightning.data.datamodule import CurriculumDataModule
from sdpo_lightning.data.findings import Finding
from sdpo_lightning.module import DPOLitModule
from sdpo_lightning.redaction import hide_in_text


class CheckCLI(EstimateCLI):
    """Takes what `fit` takes, makes nothing of it, and looks at all that can be known before weights load."""

    findings: list[Finding]

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What `estimate` takes too, and what `check` alone takes."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--show", type=int, default=0, help="pairs of each source to show as the loss sees them")
        parser.add_argument("--benchmarks", nargs="+", default=[], help="files of evaluation sets, .jsonl or text")

    def instantiate_classes(self) -> None:
        """Only data and small files are read."""
        config = self.config.as_dict()
        assert isinstance(self.model_class, type) and issubclass(self.model_class, DPOLitModule)
        own_model = self.model_class.load_weights is not DPOLitModule.load_weights
        self.findings = review(config, config["show"], own_model, config["benchmarks"])


def run_check(
    words: Sequence[str], model_class: type[DPOLitModule], datamodule_class: type[CurriculumDataModule]
) -> None:
    """Print a line a finding, errors on stderr.

    Args:
        words: after `check`.
        model_class: the module, or a subclass.
        datamodule_class: the data module, or a subclass.

    Raises:
        SystemExit: with 2 where there is an error.
    """
    findings = CheckCLI(model_class, datamodule_class, words, run=False).findings
    for level in ("info", "warning", "error"):
        for finding in findings:
            if finding.level == level:
                text = finding.text if level == "info" else f"{level}: {finding.text}"
                print(hide_in_text(text), file=sys.stderr if level == "error" else sys.stdout)
    errors = sum(finding.level == "error" for finding in findings)
    warnings = sum(finding.level == "warning" for finding in findings)
    print(f"{errors} errors, {warnings} warnings")
    if errors:
        raise SystemExit(2)
