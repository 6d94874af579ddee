"""The variants of `gpu.py`, each a function from a job to its figures.

Nothing here is imported before it is needed: ours runs with torch and transformers (and peft, for LoRA) alone.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu_jobs import CHECK_STEPS, SETTINGS, Job, Setting
from benchmarks.workloads import Ids, llama_config, pair_ids

BETA, CLIP = 0.1, 1.0
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def run(job: Job) -> dict[str, Any]:
    """Losses of the first steps, seconds of the timed pairs, peak MB (None but on CUDA) and the device's name."""
    cuda = job.device.startswith("cuda")
    result = (run_trl if job.variant.startswith("trl") else run_bare)(job)
    result["peak_mb"] = torch.cuda.max_memory_allocated() / 2**20 if cuda else None
    return result | {"device": torch.cuda.get_device_name() if cuda else job.device}


def wait(device: str) -> float:
    """The time, once the device has done all it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def ids_of(job: Job) -> tuple[list[Ids], list[Ids]]:
    """Ids of the pairs that are checked, step after step, and of those that are timed."""
    vocab = SETTINGS[job.setting].shape.vocab
    # The same pairs in each step: a loss moves most on the pairs that were trained on.
    return CHECK_STEPS * pair_ids(job.check_pairs, vocab, seed=1), pair_ids(job.timed_pairs, vocab, seed=0)


def make_model(setting: Setting, job: Job, attention: str) -> nn.Module:
    """A seeded random Llama on the job's device: equal weights in every variant."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config, dtype = llama_config(setting.shape, max(job.length, 8192)), getattr(torch, setting.weights)
    with torch.device(job.device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    return model.train()


def _lora_config() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=16, target_modules=LORA_TARGETS, lora_dropout=0.0, task_type="CAUSAL_LM")


@torch.no_grad()
def seed_adapters(model: nn.Module) -> None:
    """Equal adapters in every variant. As B is zero, no logp changes."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            bound = parameter.shape[1] ** -0.5
            parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))


# ---- ours, and the packed baseline


def run_bare(job: Job) -> dict[str, Any]:
    """Our parts in a plain loop: a reference pass that caches logps, then training."""
    loop = BareLoop(job)
    checked, timed = ids_of(job)
    losses = loop.train(checked, loop.reference(checked))
    start = wait(job.device)
    references = loop.reference(timed)
    middle = wait(job.device)
    loop.train(timed, references)
    end = wait(job.device)
    return {"losses": losses, "seconds": end - start, "reference_seconds": middle - start}


class BareLoop:
    """Model, optimizer and layout of one job."""

    def __init__(self, job: Job) -> None:
        from sdpo_lightning.attention import register_segment_attention
        from sdpo_lightning.backbone import CausalBackbone
        from sdpo_lightning.data.collate import PackedCollator, SharedPrefixCollator

        self.job, self.setting = job, SETTINGS[job.setting]
        model = make_model(self.setting, job, register_segment_attention())
        if self.setting.lora:
            from peft import get_peft_model

            # The adapters are inside of the model that is wrapped.
            model = get_peft_model(model, _lora_config()).get_base_model()
            seed_adapters(model)
        if job.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.model = CausalBackbone(model, job.logits_budget_mb)
        self.model.offloads_activations = job.offload
        if job.compiled:
            self.model.compile_layers()
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.setting, self.trained)
        self.collator = (SharedPrefixCollator if job.variant == "ours" else PackedCollator)(pad_token_id=0)

    def batches(self, pairs: Sequence[Ids]) -> Iterator[Any]:
        """Micro-batches on the device."""
        from sdpo_lightning.data.collate import TokenizedPair

        for start in range(0, len(pairs), self.job.micro_batch):
            part = [TokenizedPair(*ids) for ids in pairs[start : start + self.job.micro_batch]]
            numbers = range(start, start + len(part))
            batch = self.collator(numbers, part, [1.0] * len(part), self.job.step_pairs)
            yield batch.to(self.job.device, non_blocking=True)

    def score(self, batch: Any) -> Any:
        """Summed logps of a batch, in the setting's precision."""
        from sdpo_lightning.logprobs import pair_logps

        with torch.autocast(self.job.device.split(":")[0], torch.bfloat16, enabled=self.setting.bf16):
            return pair_logps(self.model(batch), batch)

    @torch.no_grad()
    def reference(self, pairs: Sequence[Ids]) -> list[Any]:
        """Logps of all pairs by the weights as they are."""
        self.model.eval()
        found = [self.score(batch) for batch in self.batches(pairs)]
        self.model.train()
        return found

    def train(self, pairs: Sequence[Ids], references: Sequence[Any]) -> list[float]:
        """One pass; the mean loss of every optimizer step."""
        from sdpo_lightning.losses import dpo_loss

        steps: list[Tensor] = []
        for number, batch in enumerate(self.batches(pairs)):
            loss = dpo_loss(self.score(batch), references[number], BETA).sum() / self.job.step_pairs
            loss.backward()
            first = number * self.job.micro_batch % self.job.step_pairs == 0
            steps = [*steps, loss.detach()] if first else [*steps[:-1], steps[-1] + loss.detach()]
            if (number + 1) * self.job.micro_batch % self.job.step_pairs == 0:
                nn.utils.clip_grad_norm_(self.trained, CLIP)
                self.optimizer.step()
                self.optimizer.zero_grad()
        return [step.item() for step in steps]


def make_optimizer(setting: Setting, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW in the setting's precision."""
    if setting.eight_bit:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, lr=setting.learning_rate, weight_decay=0.0)
    return torch.optim.AdamW(parameters, lr=setting.learning_rate, weight_decay=0.0, fused=True)


# ---- TRL


def run_trl(job: Job) -> dict[str, Any]:
    """TRL's `DPOTrainer`, with its default flags or its best."""
    from datasets import Dataset

    setting, best = SETTINGS[job.setting], job.variant == "trl_best"
    checked, timed = ids_of(job)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = Dataset.from_list([dict(zip(names, ids, strict=True)) for ids in (*checked, *timed)])
    model = make_model(setting, job, "sdpa")
    # Without a model's name, TRL can't make the reference itself.
    reference = None if best or setting.lora else make_model(setting, job, "sdpa").eval()
    with tempfile.TemporaryDirectory() as out:
        trainer = _timed_trainer(job)(
            model,
            reference,
            _trl_config(job, setting, out),
            train_dataset=rows,
            processing_class=_tokenizer(),
            peft_config=_lora_config() if setting.lora else None,
        )
        seed_adapters(trainer.model)
        trainer.train()
    # The reference pass went over the checked pairs too; they are left out by their share of tokens.
    tokens, own = (sum(2 * p + c + r for p, c, r in pairs) for pairs in (job.check_pairs, job.timed_pairs))
    reference_seconds = trainer.reference_seconds * own / (CHECK_STEPS * tokens + own)
    micro_batches = job.step_pairs // job.micro_batch
    losses = torch.stack(trainer.losses[: CHECK_STEPS * micro_batches]).view(CHECK_STEPS, -1).mean(1).tolist()
    seconds = trainer.end - trainer.start + reference_seconds
    return {"losses": losses, "seconds": seconds, "reference_seconds": reference_seconds or None}


def _timed_trainer(job: Job) -> Callable[..., Any]:
    """`DPOTrainer` on ids, in the order of the rows, which keeps its losses and times."""
    import trl
    from torch.utils.data import SequentialSampler

    class Timed(trl.DPOTrainer):
        start = end = reference_seconds = 0.0

        def _prepare_dataset(self, dataset, *arguments, **keywords):
            self.losses: list[Tensor] = []
            return dataset

        def _get_train_sampler(self, dataset=None):
            return SequentialSampler(dataset if dataset is not None else self.train_dataset)

        def _precompute_ref_logps(self, dataset, name, batch_size):
            # Kernels are compiled before the clock runs.
            super()._precompute_ref_logps(dataset.select(range(batch_size)), name, batch_size)
            start = wait(job.device)
            scored = super()._precompute_ref_logps(dataset, name, batch_size)
            self.reference_seconds = wait(job.device) - start
            return scored

        def compute_loss(self, *arguments, **keywords):
            if self.state.global_step == CHECK_STEPS and not self.start:
                self.start = wait(job.device)
            loss = super().compute_loss(*arguments, **keywords)
            self.losses.append(loss.detach())
            return loss

        def train(self, *arguments, **keywords):
            output = super().train(*arguments, **keywords)
            self.end = wait(job.device)
            return output

    return Timed


def _trl_config(job: Job, setting: Setting, out: str) -> Any:
    import trl

    best = job.variant == "trl_best"
    return trl.DPOConfig(
        output_dir=out,
        per_device_train_batch_size=job.micro_batch,
        gradient_accumulation_steps=job.step_pairs // job.micro_batch,
        learning_rate=setting.learning_rate,
        lr_scheduler_type="constant",
        num_train_epochs=1,
        max_length=job.length,
        max_grad_norm=CLIP,
        weight_decay=0.0,
        beta=BETA,
        bf16=setting.bf16,
        optim="adamw_bnb_8bit" if setting.eight_bit else "adamw_torch_fused",
        gradient_checkpointing=job.checkpointing,
        precompute_ref_log_probs=best,
        activation_offloading=job.offload,
        use_liger_kernel=best and job.device != "cpu" and find_spec("liger_kernel") is not None,
        logging_strategy="no",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=job.device == "cpu",
    )


def _tokenizer() -> Any:
    """Padding and EOS, which is all that TRL asks for when the rows are ids."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
