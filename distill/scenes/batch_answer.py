"""Answer questions about pictures many at a time, with a model in PyTorch: for tables of variants.

The bundle that ships is scored on its own runtime (eval_command.py); this serves comparisons of
checkpoints, where a GPU answers ten thousand questions in seconds.
"""

import numpy as np
import torch

from mmmamba_edge.distill.batches import normalised
from mmmamba_edge.distill.scenes.eval_command import ANSWER_TOKENS
from mmmamba_edge.distill.scenes.score import AnswerBatch
from mmmamba_edge.model.decoder import MMMamba
from mmmamba_edge.prompt import get_template
from mmmamba_edge.tokenizer import Tokenizer


def batch_answerer(model: MMMamba, tokenizer: Tokenizer) -> AnswerBatch:
    """answers(list of (picture (height, width, 3) uint8, question)) -> greedy answers, in order.

    Every question is a conversation of its own, its prompt exactly that of chat.
    """
    template = get_template(model.config.template)
    device = model.language_model.output.weight.device
    stops = torch.tensor(sorted(template.stop_ids(tokenizer)), device=device)

    @torch.inference_mode()
    def answer(asked: list[tuple[np.ndarray, str]]) -> list[str]:
        prompts = [
            tokenizer.encode(
                template.opening()
                + template.user_turn(text, [1], tokens_per_tile=model.config.tokens_per_tile)
                + template.assistant_prefix
            )
            for _, text in asked
        ]
        longest = max(map(len, prompts))
        ids = torch.zeros(len(asked), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.from_numpy(prompt)
            mask[row, : len(prompt)] = 1
        pixels = torch.from_numpy(np.stack([image.transpose(2, 0, 1) for image, _ in asked]))
        state = model.new_state(len(asked), max_context=longest + ANSWER_TOKENS)
        logits, state = model.prefill(
            ids.to(device), state, normalised(pixels.to(device)), attention_mask=mask.to(device)
        )
        said = []
        ended = torch.zeros(len(asked), dtype=torch.bool, device=device)
        for _ in range(ANSWER_TOKENS):
            token = logits.argmax(-1)
            said.append(token.cpu())
            ended |= torch.isin(token, stops)
            if bool(ended.all()):
                break
            logits, state = model.step(token, state)
        columns = torch.stack(said, dim=1)  # (questions, tokens)
        return [_until_stop(row.tolist(), stops.tolist(), tokenizer) for row in columns]

    return answer


def _until_stop(ids: list[int], stops: list[int], tokenizer: Tokenizer) -> str:
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    return tokenizer.decode(ids[:end]).strip()
