"""Squared per-example gradients: equal to one backward pass per example, whatever the model."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from unlearn import squares
from unlearn.errors import Unsupported
from unlearn.importance import squared_gradients

torch.set_num_threads(1)

BATCH = 6
CLASSES = 5


def one_by_one(model, nll):
    """The definition: one backward pass per example."""
    parameters = dict(model.named_parameters())
    totals = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for loss in nll():
        gradients = torch.autograd.grad(
            loss, list(parameters.values()), retain_graph=True, allow_unused=True
        )
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                totals[name] += gradient**2
    return totals


def same_as_one_by_one(model, nll, zero=()):
    """``zero`` names gradients that vanish analytically and of which only rounding is left."""
    expected = one_by_one(model, nll)
    found = squared_gradients(model, nll, dict(model.named_parameters()))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape
        assert found[name].dtype == value.dtype
        if any(part in name for part in zero):
            assert found[name].max() < 1e-25
        else:
            floor = 1e-16 * value.max().item()
            torch.testing.assert_close(found[name], value, rtol=1e-10, atol=floor, msg=name)
    return found


def prepared(model):
    """In float64 and eval mode, with every weight, bias and statistic away from its default."""
    torch.manual_seed(0)
    model = model.double().eval()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and tensor.dim() == 1:
            tensor.data = 0.5 + torch.rand_like(tensor)
    return model


def classification(model, x):
    y = torch.arange(len(x)) % CLASSES

    def nll():
        output = model(x)
        return F.cross_entropy(getattr(output, "logits", output), y, reduction="none")

    return nll


def language(model, ids):
    def nll():
        logits = model(input_ids=ids).logits[:, :-1]
        losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        return losses.view(len(ids), -1).sum(1)

    return nll


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def tokens(vocabulary=23, length=9):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(vocabulary, (BATCH, length), generator=generator)


class Block(nn.Module):
    """As in torchvision's ResNets: activations in place, and the shortcut added in place."""

    def __init__(self, width, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, groups=2)
        self.bn2 = nn.BatchNorm2d(width)
        self.down = nn.Conv2d(width, width, 1, stride) if stride > 1 else None

    def forward(self, x):
        identity = x if self.down is None else self.down(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


def residual_net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.ReLU(inplace=True),
        Block(8),
        Block(8, stride=2),
        Block(8, stride=2),
        nn.Flatten(),
        nn.Linear(32, CLASSES),
    )


def convolutional(convolution, shape):
    channels = convolution(random(1, *shape).float()).numel()
    return nn.Sequential(convolution, nn.Flatten(), nn.Tanh(), nn.Linear(channels, CLASSES))


# -- closed forms ----------------------------------------------------------------------------------


def test_two_layers_by_hand():
    # y = v * (w . x): dy/dw = v * x, dy/dv = w . x, with w = (1, 2), v = 3
    net = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 1))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 2.0]]))
        net[1].weight.fill_(3.0)
    x = torch.tensor([[1.0, 0.0], [2.0, 1.0]])  # w . x is 1, then 4
    found = squared_gradients(net, lambda: net(x)[:, 0], dict(net.named_parameters()))
    assert found["0.weight"].tolist() == [[9.0 * (1 + 4), 9.0 * (0 + 1)]]
    assert found["1.weight"].tolist() == [[1.0 + 16.0]]
    assert found["1.bias"].tolist() == [2.0]


def test_it_is_not_the_square_of_the_sum():
    net = nn.Linear(1, 1, bias=False)
    x = torch.tensor([[1.0], [-1.0]])
    assert squared_gradients(net, lambda: net(x)[:, 0], {"w": net.weight})["w"].item() == 2.0


# -- one backward pass per example -----------------------------------------------------------------


@pytest.mark.parametrize("tokens_per_example", [0, 1, 3, 7], ids="{} tokens".format)
def test_linear_maps_and_norms(tokens_per_example):
    class Mean(nn.Module):
        def forward(self, x):
            return x.mean(1) if x.dim() > 2 else x

    net = prepared(
        nn.Sequential(
            nn.Linear(8, 12),
            nn.ReLU(inplace=True),
            nn.LayerNorm(12),
            nn.Linear(12, 9, bias=False),
            nn.RMSNorm(9),
            nn.PReLU(),
            Mean(),
            nn.Linear(9, CLASSES),
        )
    )
    shape = (BATCH, tokens_per_example, 8) if tokens_per_example else (BATCH, 8)
    same_as_one_by_one(net, classification(net, random(*shape)))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("convolution", "shape"),
    [
        (nn.Conv2d(4, 6, 3, 2, 1, groups=2), (4, 9, 8)),
        (nn.Conv2d(4, 6, 3, 1, 2, dilation=2), (4, 5, 6)),
        (nn.Conv2d(4, 6, (3, 2), padding="same"), (4, 5, 6)),
        (nn.Conv2d(4, 6, 3, 1, 1, padding_mode="reflect"), (4, 5, 6)),
        (nn.Conv2d(4, 6, 3, 1, 1, padding_mode="circular"), (4, 2, 2)),
        (nn.Conv2d(4, 4, 3, 1, 1, groups=4), (4, 2, 2)),  # few positions, mostly padding
        (nn.Conv2d(4, 6, 3, 2, 1, groups=2), (4, 2, 2)),  # one position
        (nn.Conv2d(4, 6, (4, 3)), (4, 4, 3)),  # one position, no padding
        (nn.Conv2d(4, 6, 2, 2), (4, 4, 4)),  # few positions, no padding
        (nn.Conv2d(4, 6, 1), (4, 4, 5)),
        (nn.Conv2d(4, 6, 1, stride=2), (4, 5, 4)),
    ],
    ids=str,
)
def test_convolutions_in_two_dimensions(convolution, shape, channels_last):
    net = prepared(convolutional(convolution.float(), shape))
    x = random(BATCH, *shape)
    if channels_last:
        x, net = x.to(memory_format=torch.channels_last), net.to(memory_format=torch.channels_last)
    same_as_one_by_one(net, classification(net, x))


@pytest.mark.parametrize(
    ("convolution", "shape"),
    [
        (nn.Conv1d(4, 6, 3, 2, 1, groups=2), (4, 15)),
        (nn.Conv1d(4, 6, 5, padding=2), (4, 3)),
        (nn.Conv3d(4, 6, 3, 2, 1), (4, 5, 4, 3)),
        (nn.ConvTranspose2d(4, 3, 2), (4, 3, 3)),  # no rule of its own
    ],
    ids=str,
)
def test_other_convolutions(convolution, shape):
    net = prepared(convolutional(convolution, shape))
    same_as_one_by_one(net, classification(net, random(BATCH, *shape)))


def test_residual_net_with_operations_in_place():
    net = prepared(residual_net())
    same_as_one_by_one(net, classification(net, random(BATCH, 3, 16, 16)))


def test_normalisations_over_channels():
    net = prepared(
        nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.BatchNorm2d(4), nn.ReLU(),
            nn.InstanceNorm2d(4, affine=True), nn.Flatten(), nn.BatchNorm1d(64),
            nn.Linear(64, CLASSES),
        )
    )  # fmt: skip
    same_as_one_by_one(net, classification(net, random(BATCH, 3, 6, 6)))


def test_chunks_do_not_change_the_result(monkeypatch):
    net = prepared(residual_net())
    nll = classification(net, random(BATCH, 3, 16, 16))
    monkeypatch.setitem(squares.CHUNK, "cpu", 1)
    same_as_one_by_one(net, nll)


def test_resnet():
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12], depths=[1, 2], num_labels=CLASSES,
        layer_type="basic",
    )  # fmt: skip
    model = prepared(ResNetForImageClassification(config))
    same_as_one_by_one(model, classification(model, random(BATCH, 3, 16, 16)))


def test_vit():
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        image_size=8, patch_size=4, num_labels=CLASSES,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = prepared(ViTForImageClassification(config))
    # a bias on the keys moves every score of a query alike, and softmax does not see it
    zero = ("k_proj.bias", "key.bias")
    found = same_as_one_by_one(model, classification(model, random(BATCH, 3, 8, 8)), zero)
    assert sum("cls_token" in name or "position_embeddings" in name for name in found) == 2


@pytest.mark.parametrize("tied", [True, False])
def test_llama(tied):
    config = LlamaConfig(
        vocab_size=23, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tied,
    )  # fmt: skip
    model = prepared(LlamaForCausalLM(config))
    found = same_as_one_by_one(model, language(model, tokens()))
    assert ("lm_head.weight" in found) is not tied


def test_head_on_gathered_positions():
    config = LlamaConfig(
        vocab_size=23, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = prepared(LlamaForCausalLM(config))
    ids = tokens()
    chosen = torch.tensor([1, 4, 6])

    def nll():
        logits = model.lm_head(model.model(input_ids=ids).last_hidden_state[:, chosen])
        labels = ids[:, chosen + 1]
        return F.cross_entropy(logits.mT, labels, reduction="none").sum(1)

    same_as_one_by_one(model, nll)


def test_gpt2():
    config = GPT2Config(
        vocab_size=23, n_embd=16, n_layer=2, n_head=2, n_positions=12, bos_token_id=0,
        eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = prepared(GPT2LMHeadModel(config))
    same_as_one_by_one(model, language(model, tokens()))


def test_embedding_leaves_out_its_padding():
    net = prepared(nn.Sequential(nn.Embedding(7, 4, padding_idx=0), nn.Flatten(), nn.Linear(12, 5)))
    ids = torch.tensor([[0, 3, 3], [1, 0, 2], [3, 3, 3], [6, 1, 6]])
    found = same_as_one_by_one(net, classification(net, ids))
    assert found["0.weight"][0].eq(0).all()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_attention_that_does_not_call_its_output_projection():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True)
            self.head = nn.Linear(8, CLASSES)

        def forward(self, x):
            return self.head(self.encoder(x)[:, 0])

    net = Net().double().eval()
    x = random(BATCH, 4, 8)
    found = same_as_one_by_one(net, classification(net, x))
    assert found["encoder.self_attn.out_proj.weight"].gt(0).all()


class Twice(nn.Module):
    def __init__(self, shared):
        super().__init__()
        self.shared = shared
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        x = torch.tanh(self.shared(x))
        x = self.shared(x)
        return self.head(x.flatten(2).mean(2) if x.dim() > 2 else x)


@pytest.mark.parametrize(
    ("shared", "shape"),
    [
        (nn.Linear(8, 8), (8,)),
        (nn.Conv2d(8, 8, 3, 1, 1), (8, 3, 4)),
        (nn.BatchNorm2d(8), (8, 3, 4)),
    ],
    ids=str,
)
def test_module_called_twice(shared, shape):
    net = prepared(Twice(shared))
    same_as_one_by_one(net, classification(net, random(BATCH, *shape)))


def test_module_with_several_outputs_and_keyword_inputs():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.5))
            self.unused = nn.Linear(3, 3)

        def forward(self, *, x, factor):
            return {"plain": x * self.scale, "square": (factor * x * self.scale**2,)}

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair = Pair()
            self.head = nn.Linear(4, CLASSES)

        def forward(self, x):
            out = self.pair(x=x, factor=2.0)
            return self.head(out["plain"] + out["square"][0])

    net = Net().double()
    found = same_as_one_by_one(net, classification(net, random(BATCH, 4)))
    assert found["pair.unused.weight"].eq(0).all()


class Doubled(nn.Linear):
    def forward(self, x):
        return F.linear(x, 2 * self.weight, self.bias)


def test_hooks_and_replaced_forwards_of_others():
    net = nn.Sequential(
        nn.Linear(4, 4), nn.PReLU(4), Doubled(4, 4), nn.Linear(4, 4), nn.Linear(4, CLASSES)
    )
    net = prepared(net)
    for module in net[:2]:
        module.register_forward_pre_hook(lambda _, args: (args[0] - 2,))
        module.register_forward_hook(lambda _, args, output: 2 * output)
    net[3].forward = lambda x: F.linear(x, net[3].weight ** 2, net[3].bias)
    same_as_one_by_one(net, classification(net, random(BATCH, 4)))


def test_module_whose_result_is_thrown_away_counts_nothing():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(4, 4)
            self.head = nn.Linear(4, CLASSES)

        def forward(self, x):
            self.body(x)
            return self.head(x + self.body(x))

    net = Net().double()
    same_as_one_by_one(net, classification(net, random(BATCH, 4)))


def test_only_the_wanted_parameters_in_single_precision():
    torch.manual_seed(0)
    net = residual_net().eval()
    nll = classification(net, random(BATCH, 3, 16, 16).float())
    wanted = {"a": net[0].weight, "b": net[6].bias}
    found = squared_gradients(net, nll, wanted)
    expected = one_by_one(net, nll)
    assert found.keys() == {"a", "b"}
    torch.testing.assert_close(found["a"], expected["0.weight"], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found["b"], expected["6.bias"], rtol=1e-4, atol=1e-7)


# -- what is left as it was found ------------------------------------------------------------------


def test_one_forward_and_nothing_left_behind():
    net = prepared(residual_net())
    net[0].weight.requires_grad_(False)
    net[6].bias.grad = torch.ones_like(net[6].bias)
    calls = []
    hooks = [module.register_forward_hook(lambda *_: calls.append(1)) for module in net]
    nll = classification(net, random(BATCH, 3, 16, 16))
    first = squared_gradients(net, nll, dict(net.named_parameters()))
    second = squared_gradients(net, nll, dict(net.named_parameters()))
    assert len(calls) == 2 * len(net)
    assert all(first[name].equal(second[name]) for name in first)
    assert first["0.weight"].gt(0).all()  # wanted, although frozen
    for name, p in net.named_parameters():
        assert p.requires_grad is (name != "0.weight")
        assert (p.grad is not None) is (name == "6.bias")
    assert net[6].bias.grad.eq(1).all()
    for hook in hooks:
        hook.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_nothing_left_behind_by_an_exception(when):
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            if when == "forward":
                raise KeyError(when)
            return x.clone()

        @staticmethod
        def backward(ctx, delta):
            raise KeyError(when)

    net = prepared(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, CLASSES))).train()
    net[0].weight.requires_grad_(False)
    nll = classification(net, random(BATCH, 4))
    with pytest.raises(KeyError, match=when):
        squared_gradients(net, lambda: Fails.apply(nll()), dict(net.named_parameters()))
    assert [p.requires_grad for p in net.parameters()] == [False, True, True, True]
    assert all(p.grad is None for p in net.parameters())
    assert all(m.training for m in net.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


# -- what is refused -------------------------------------------------------------------------------


def refuses(net, nll, *words):
    before = [p.requires_grad for p in net.parameters()]
    with pytest.raises(Unsupported) as refusal:
        squared_gradients(net, nll, dict(net.named_parameters()))
    for word in words:
        assert word in str(refusal.value)
    assert [p.requires_grad for p in net.parameters()] == before
    assert all(p.grad is None for p in net.parameters())


def test_refuses_batch_statistics():
    net = residual_net()
    refuses(net, classification(net, random(BATCH, 3, 16, 16).float()), "2.bn1", "eval()")


def test_refuses_examples_folded_into_tokens():
    class Folds(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, CLASSES)

        def forward(self, x):
            return self.inner(x.flatten(0, 1)).unflatten(0, x.shape[:2]).mean(1)

    net = Folds().double()
    refuses(net, classification(net, random(BATCH, 3, 4)), "inner (Linear)", "batch")


def test_refuses_positions_as_many_as_examples():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(BATCH, 4)
            self.head = nn.Linear(4, CLASSES)

        def forward(self, x):
            return self.head((x * self.table(torch.arange(BATCH))).sum(1))

    net = Positions().double()
    refuses(net, classification(net, random(BATCH, BATCH, 4)), "table (Embedding)")


def test_refuses_an_input_modified_in_place():
    class Overwrites(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.head = nn.Linear(4, CLASSES)

        def forward(self, x):
            x = x + 1
            y = self.inner(x)
            x += y
            return self.head(x)

    net = Overwrites().double()
    refuses(net, classification(net, random(BATCH, 4)), "inner (Linear)", "in place")


def test_refuses_a_parameter_used_outside_its_module():
    class Borrows(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, CLASSES)

        def forward(self, x):
            return F.linear(x, self.inner.weight)

    net = Borrows().double()
    refuses(net, classification(net, random(BATCH, 4)), "inner.weight", "outside")


def test_refuses_parametrized_weights():
    net = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, CLASSES))).double()
    refuses(net, classification(net, random(BATCH, 4)), "parametrization")


def test_refuses_time_before_batch():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(4, CLASSES)

        def forward(self, x):
            return self.rnn(x.transpose(0, 1))[0][-1]

    net = Recurrent().double()
    refuses(net, classification(net, random(BATCH, BATCH, 4)), "rnn (GRU)", "batch_first")


def test_refuses_a_module_that_cannot_be_vectorised():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(CLASSES))

        def forward(self, x):
            return x * self.scale if bool((x > -100).all()) else x

    net = nn.Sequential(nn.Linear(4, CLASSES), Branches()).double()
    refuses(net, classification(net, random(BATCH, 4)), "1 (Branches)")


@pytest.mark.parametrize("reduce", [torch.mean, lambda losses: losses[:-1]])
def test_refuses_losses_that_are_not_one_per_example(reduce):
    net = nn.Linear(4, CLASSES).double()
    nll = classification(net, random(BATCH, 4))
    refuses(net, lambda: reduce(nll()), "losses have shape", str(BATCH))
