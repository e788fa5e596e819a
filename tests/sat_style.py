"""Mixins and a model written for SAT, with nothing changed but the import line."""

import torch

from sat_lightning import BaseMixin, BaseModel, non_conflict
from sat_lightning.nn import attention_fn_default


class PrefixMixin(BaseMixin):
    def __init__(self, num_layers, hidden_size_per_attention_head, num_attention_heads, prefix_len):
        super().__init__()
        shape = (2, num_attention_heads, prefix_len, hidden_size_per_attention_head)
        self.prefix = torch.nn.ParameterList([torch.nn.Parameter(torch.randn(*shape)) for _ in range(num_layers)])
        self.prefix_len = prefix_len

    @non_conflict
    def attention_fn(self, q, k, v, mask, dropout_fn, old_impl=attention_fn_default, **kw_args):
        prefix_k, prefix_v = self.prefix[kw_args["layer_id"]]
        k = torch.cat((k, prefix_k.unsqueeze(0).expand(k.shape[0], -1, -1, -1)), dim=2)
        v = torch.cat((v, prefix_v.unsqueeze(0).expand(v.shape[0], -1, -1, -1)), dim=2)
        if mask.numel() > 1:
            extra = torch.ones(self.prefix_len, device=mask.device, dtype=mask.dtype)
            mask = torch.cat((mask, extra.expand(*(mask.size()[:-1]), -1)), dim=-1)
        return old_impl(q, k, v, mask, dropout_fn, **kw_args)


class CacheMixin(BaseMixin):
    @non_conflict
    def attention_fn(self, q, k, v, mask, dropout_fn, mems=None, cross_attention=False, old_impl=None, **kw_args):
        if not cross_attention:
            b, nh, seq_len, hidden_size = k.shape
            kw_args["output_this_layer"]["mem_kv"] = (
                torch.stack((k, v)).permute(1, 3, 0, 2, 4).detach().contiguous().view(b, seq_len, nh * hidden_size * 2)
            )
            if mems is not None:
                mem = mems[kw_args["layer_id"]]
                mem = mem.expand(b, -1, -1).reshape(b, mem.shape[1], 2, nh, hidden_size).permute(2, 0, 3, 1, 4)
                k = torch.cat((mem[0], k), dim=2)
                v = torch.cat((mem[1], v), dim=2)
        return old_impl(q, k, v, mask, dropout_fn, cross_attention=cross_attention, mems=mems, **kw_args)


class RelativeBiasMixin(BaseMixin):
    """T5's habit: the first layer makes the bias, later ones receive it through output_cross_layer."""

    def __init__(self, num_heads, max_length):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.randn(num_heads, 2 * max_length + 1))
        self.max_length = max_length

    @non_conflict
    def attention_fn(self, q, k, v, mask, dropout_fn, position_bias=None, old_impl=None, **kw_args):
        if position_bias is None:
            distance = torch.arange(k.shape[2])[None, :] - torch.arange(q.shape[2])[:, None]
            position_bias = self.bias[:, distance.clamp(-self.max_length, self.max_length) + self.max_length][None]
        kw_args["output_cross_layer"]["position_bias"] = position_bias
        return old_impl(q, k, v, mask, dropout_fn, log_attention_weights=position_bias, **kw_args)


class AdaptersMixin(BaseMixin):
    def __init__(self, num_layers, hidden_size, adapter_hidden):
        super().__init__()
        self.down = torch.nn.ModuleList([torch.nn.Linear(hidden_size, adapter_hidden) for _ in range(num_layers)])
        self.up = torch.nn.ModuleList([torch.nn.Linear(adapter_hidden, hidden_size) for _ in range(num_layers)])

    def layer_forward(self, hidden_states, mask, *args, **kw_args):
        layer = self.transformer.layers[kw_args["layer_id"]]
        attention_output = layer.attention(layer.input_layernorm(hidden_states), mask, **kw_args)
        i = kw_args["layer_id"]
        attention_output = attention_output + self.up[i](torch.nn.functional.gelu(self.down[i](attention_output)))
        hidden_states = hidden_states + attention_output
        return hidden_states + layer.mlp(layer.post_attention_layernorm(hidden_states), **kw_args)


class FFAddMixin(BaseMixin):
    def __init__(self, hidden_size, num_layers, r):
        super().__init__()
        self.down = torch.nn.ModuleList([torch.nn.Linear(hidden_size, r) for _ in range(num_layers)])
        self.up = torch.nn.ModuleList([torch.nn.Linear(r, hidden_size) for _ in range(num_layers)])

    def mlp_forward(self, hidden_states, layer_id, **kw_args):
        layer = self.transformer.layers[layer_id].mlp
        output = layer.dense_4h_to_h(layer.activation_func(layer.dense_h_to_4h(hidden_states)))
        return output + self.up[layer_id](layer.activation_func(self.down[layer_id](hidden_states)))


class HeadMixin(BaseMixin):
    def __init__(self, hidden_size, *output_sizes):
        super().__init__()
        self.layers = torch.nn.ModuleList()
        for size in output_sizes:
            self.layers.append(torch.nn.Linear(hidden_size, size))
            hidden_size = size

    def final_forward(self, logits, **kw_args):
        for i, layer in enumerate(self.layers):
            logits = layer(torch.relu(logits) if i > 0 else logits)
        return logits


class RouterMixin(BaseMixin):
    def __init__(self, num_layers, hidden_size, num_experts):
        super().__init__()
        self.gates = torch.nn.ModuleList(
            [torch.nn.Linear(hidden_size, num_experts, bias=False) for _ in range(num_layers)]
        )

    def routing_forward(self, hidden_states, layer_id, **kw_args):
        scores = self.gates[layer_id](hidden_states.reshape(-1, hidden_states.shape[-1])).softmax(-1)
        weights, chosen = torch.topk(scores, 2, dim=-1)
        return weights / weights.sum(-1, keepdim=True), chosen


class LegacyModel(BaseModel):
    """A SAT model class: `args`, an optional transformer, keyword overrides, mixins added in the constructor."""

    def __init__(self, args, transformer=None, **kwargs):
        super().__init__(args, transformer=transformer, activation_func=torch.nn.functional.relu, **kwargs)
        self.add_mixin(
            "prefix",
            PrefixMixin(args.num_layers, args.hidden_size // args.num_attention_heads, args.num_attention_heads, 3),
        )
        self.add_mixin("head", HeadMixin(args.hidden_size, 16, 2))

    def position_embedding_forward(self, position_ids, output_cross_layer, **kw_args):
        return self.transformer.position_embeddings(position_ids) * 0.5
