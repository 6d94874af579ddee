"""Rank 0: popular preference sets by name: where they are and how their rows look; see `docs/datasets.md`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True)
class Preset:
    """Settings of a source that a user needn't write.

    Attributes:
        path: name on the hub.
        split: with the pairs to train on.
        columns: as `PreferenceSource.columns`.
    """

    path: str
    split: str = "train"
    columns: Mapping[str, str] = field(default_factory=dict)


_SYSTEM_QUESTION = {"system": "system", "prompt": "question"}

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "hh_rlhf": Preset("Anthropic/hh-rlhf"),
        "orca_dpo_pairs": Preset("Intel/orca_dpo_pairs", columns=_SYSTEM_QUESTION),
        "distilabel_orca": Preset(
            "argilla/distilabel-intel-orca-dpo-pairs", columns={"system": "system", "prompt": "input"}
        ),
        "ultrafeedback_binarized": Preset("HuggingFaceH4/ultrafeedback_binarized", split="train_prefs"),
        "ultrafeedback_binarized_cleaned": Preset("allenai/ultrafeedback_binarized_cleaned", split="train_prefs"),
        "ultrafeedback_argilla": Preset("argilla/ultrafeedback-binarized-preferences-cleaned"),
        "ultrafeedback_rated": Preset(
            "openbmb/UltraFeedback",
            columns={
                "prompt": "instruction",
                "answers": "completions.response",
                "scores": "completions.overall_score",
            },
        ),
        "capybara": Preset("argilla/distilabel-capybara-dpo-7k-binarized"),
        "helpsteer3": Preset(
            "nvidia/HelpSteer3",
            columns={"prompt": "context", "answers": "response1, response2", "preference": "overall_preference"},
        ),
        "tulu_preference_mix": Preset("allenai/llama-3.1-tulu-3-8b-preference-mixture"),
        "skywork_preference": Preset("Skywork/Skywork-Reward-Preference-80K-v0.2"),
        "nectar": Preset("berkeley-nest/Nectar", columns={"answers": "answers.answer", "ranks": "answers.rank"}),
        "pku_safe_rlhf": Preset(
            "PKU-Alignment/PKU-SafeRLHF", columns={"answers": "response_0, response_1", "best": "better_response_id"}
        ),
    }
)
