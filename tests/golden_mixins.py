"""The user mixins of the reference cases, written as a SAT user writes them."""

import torch
from torch import nn

from sat_lightning import BaseMixin, non_conflict, replacable


class Writer(BaseMixin):
    def __init__(self, hidden_size):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(hidden_size))

    def word_embedding_forward(self, input_ids, output_cross_layer, **kw_args):
        hidden_states = self.transformer.word_embeddings(input_ids)
        output_cross_layer["carry"] = hidden_states * self.w
        return hidden_states

    @non_conflict
    def attention_forward(self, hidden_states, mask, old_impl=None, **kw_args):
        output = old_impl(hidden_states, mask, **kw_args)
        kw_args["output_this_layer"]["attn_out"] = output
        kw_args["output_cross_layer"]["carry"] = output * self.w + 0.5 * kw_args["carry"]
        return output


class Reader(BaseMixin):
    def __init__(self):
        super().__init__()
        self.r = nn.Parameter(torch.zeros(32))

    @non_conflict
    def mlp_forward(self, hidden_states, old_impl=None, **kw_args):
        output = old_impl(hidden_states, **kw_args)
        if "carry" in kw_args:
            kw_args["output_this_layer"]["had_carry"] = hidden_states.new_ones(())
            output = output + kw_args["carry"] * self.r
        return output


class ReplacableScale(BaseMixin):
    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.zeros(1))

    @replacable
    def final_forward(self, logits, **kw_args):
        return logits * (2 + self.a)


class PlainScale(BaseMixin):
    def __init__(self):
        super().__init__()
        self.b = nn.Parameter(torch.zeros(1))

    def final_forward(self, logits, **kw_args):
        return logits * (3 + self.b)


class Shift(BaseMixin):
    def __init__(self, size):
        super().__init__()
        self.c = nn.Parameter(torch.zeros(size))

    @non_conflict
    def final_forward(self, logits, old_impl=None, **kw_args):
        return old_impl(logits, **kw_args) + self.c


class Router(BaseMixin):
    def __init__(self, num_layers, hidden_size, num_experts):
        super().__init__()
        self.gates = nn.ModuleList(nn.Linear(hidden_size, num_experts, bias=False) for _ in range(num_layers))

    def routing_forward(self, hidden_states, layer_id, **kw_args):
        scores = self.gates[layer_id](hidden_states.flatten(0, -2)).softmax(-1)
        weights, chosen = scores.topk(2, dim=-1)
        return weights / weights.sum(-1, keepdim=True), chosen


class HeadScale(BaseMixin):
    def __init__(self, num_heads, head_size):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(num_heads, 1, head_size))
        self.out = nn.Parameter(torch.zeros(num_heads, 1, head_size))

    @non_conflict
    def attention_fn(self, q, k, v, mask, dropout_fn, old_impl=None, **kw_args):
        return old_impl(q * (1 + self.scale), k, v, mask, dropout_fn, **kw_args) * (1 + self.out)


class HeadShift(BaseMixin):
    def __init__(self, num_heads, head_size):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(num_heads, 1, head_size))

    @non_conflict
    def attention_fn(self, q, k, v, mask, dropout_fn, old_impl=None, **kw_args):
        kw_args["output_this_layer"]["q_mean"] = q.mean(-1)
        return old_impl(q + self.shift, k, v, mask, dropout_fn, **kw_args)
