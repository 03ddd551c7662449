"""Reading the activations that an SAE is measured on."""

from __future__ import annotations

from typing import Any

import torch
from sae_lens import SAE
from torch import Tensor

from ..errors import ArtifactError, ConfigError
from ..model.hook_point import HookPoint
from ..model.text import open_text, token_batches, token_sequences
from .model_loss import Measurement
from .options import EvalOptions

#: What an SAE's metadata, which anybody may have written, can have its model loaded with: options
#: of TransformerLens, and those of transformers that choose no code to run.
MODEL_OPTIONS = (
    *("fold_ln", "fold_value_biases", "center_writing_weights", "center_unembed"),
    *("refactor_factored_attn_matrices", "checkpoint_index", "checkpoint_value"),
    *("checkpoint_label", "first_n_layers", "n_ctx", "n_devices", "move_to_device"),
    *("default_prepend_bos", "default_padding_side", "dtype", "torch_dtype", "device_map"),
    *("low_cpu_mem_usage", "revision", "variant", "subfolder"),
)


def read_activations(sae: SAE[Any], tokens: int, device: str = "cpu") -> Tensor:
    """Activations of held-out text at the SAE's hook point, (N, d_in), N at most `tokens`.

    They are of the positions and tokens that its metadata says it was trained on.
    """
    point = hook_point_of(sae, EvalOptions(device=device))
    text, _ = open_text(sae.cfg.metadata.dataset_path)
    measurement = Measurement({"": sae}, point)
    found_ND: list[Tensor] = []
    for tokens_BP, _ in token_batches(token_sequences(sae, point, text), tokens, point.sizes()[1]):
        x_BPD = point.run(tokens_BP)[1]
        found_ND.append(x_BPD[measurement.measured(tokens_BP.to(point.device))])
    if not found_ND:
        raise ConfigError("There is no text to read activations from.")
    return torch.cat(found_ND)[:tokens]


def hook_point_of(sae: SAE[Any], options: EvalOptions) -> HookPoint:
    """The hook point that an SAE's metadata names, on the options' model or on one loaded here."""
    metadata = sae.cfg.metadata
    if metadata.hook_name is None:
        raise ArtifactError("The SAE's metadata has no hook_name, so it cannot be evaluated.")
    if metadata.hook_name_out not in (None, metadata.hook_name):
        raise ArtifactError(
            f"This is a transcoder: it reads '{metadata.hook_name}' and reconstructs "
            f"'{metadata.hook_name_out}'. Only SAEs can be evaluated."
        )
    if options.model is not None:
        point = HookPoint(options.model, metadata.hook_name, metadata.hook_head_index)
        point.require_exists(str(metadata.model_name))
        return point
    name = options.model_name or metadata.model_name
    if name is None:
        raise ConfigError("The SAE's metadata names no model; give one with model_name (--model).")
    wanted: dict[str, Any] = metadata.model_from_pretrained_kwargs or {}
    others = [option for option in wanted if option not in MODEL_OPTIONS]
    if others and not options.trust_model_options:
        raise ArtifactError(
            f"The SAE's metadata wants its model loaded with {', '.join(others)}, which may run "
            "code of whoever published it. If you trust them, allow it with trust_model_options "
            "(--trust-model-options)."
        )
    point = HookPoint.load(
        name,
        metadata.model_class_name or "HookedTransformer",
        metadata.hook_name,
        metadata.hook_head_index,
        device=options.device,
        from_pretrained_kwargs=wanted,
    )
    point.warn_of_text(metadata.context_size, metadata.prepend_bos)
    return point
