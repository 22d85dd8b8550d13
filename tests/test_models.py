"""The U-Net: shapes, text handling, attention against its formula, checkpointing."""

import pytest
import torch
from support.networks import make_inputs, make_unet

from imagen_scale.config import load_config
from imagen_scale.errors import ShapeError
from imagen_scale.models.layers import ATTN_DIM_HEAD, Attention, CrossAttention
from imagen_scale.models.unet import UNet


def test_captions_longer_than_the_network_reads_are_cut_with_their_mask():
    unet, inputs = make_unet(), make_inputs(tokens=9)
    inputs["text_mask"][:, 5] = False
    cut = inputs | {name: inputs[name][:, :6] for name in ("text_embeds", "text_mask")}
    assert torch.equal(unet(**inputs), unet(**cut))


def test_masked_tokens_do_not_matter():
    unet, inputs = make_unet(), make_inputs()
    inputs["text_mask"][:, 2:] = False
    changed = inputs | {"text_embeds": inputs["text_embeds"].clone()}
    changed["text_embeds"][:, 2:] = 7
    assert torch.equal(unet(**inputs), unet(**changed))


def test_dropped_captions_do_not_matter_one_by_one():
    unet, inputs = make_unet(), make_inputs()
    keep = torch.tensor([True, False, True])
    out, full = unet(**inputs, keep_mask=keep), unet(**inputs)
    null = unet.denoise(inputs["x_t"], inputs["t"], unet.null_text(3))
    torch.testing.assert_close(out[[0, 2]], full[[0, 2]])
    torch.testing.assert_close(out[1], null[1])
    assert (out[1] - full[1]).abs().max() > 1e-4


def test_wrong_shapes_are_named():
    unet, inputs = make_unet(), make_inputs()
    with pytest.raises(ShapeError, match=r"\(3, 4, 5\).*\(batch, tokens, 384\)"):
        unet(**inputs | {"text_embeds": torch.zeros(3, 4, 5)})
    with pytest.raises(ShapeError, match="needs lowres_img"):
        make_unet(index=1)(**inputs)


def test_self_attention_is_its_formula():
    torch.manual_seed(0)
    attention, x = Attention(16, heads=4), torch.randn(2, 10, 16)
    h = attention.norm(x)
    q = attention.to_q(h).view(2, 10, 4, ATTN_DIM_HEAD).transpose(1, 2)
    k, v = attention.to_kv(h).chunk(2, dim=-1)
    k = torch.cat((attention.null_kv[0].expand(2, 1, -1), k), dim=1)
    v = torch.cat((attention.null_kv[1].expand(2, 1, -1), v), dim=1)
    weights = (q @ k[:, None].mT * ATTN_DIM_HEAD**-0.5).softmax(-1)
    out = (weights @ v[:, None]).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention(x), attention.to_out(out), atol=1e-5, rtol=1e-4)


def test_cross_attention_sees_every_token_and_the_null_one():
    torch.manual_seed(0)
    attention, x = CrossAttention(16, context_dim=8), torch.randn(1, 5, 16)
    context = torch.randn(1, 3, 8, requires_grad=True)
    # Weighed: the plain sum of what a norm gives is the same whatever it was given.
    (attention(x, context) * torch.randn(16)).sum().backward()
    assert (context.grad.abs().sum(-1) > 0).all()
    assert (attention.null_kv.grad.abs().sum(-1) > 0).all()


def test_runs_in_pure_bf16_like_in_fp32():
    unet, inputs = make_unet(index=1), make_inputs(index=1)
    expected = unet(**inputs)
    unet.bfloat16()
    out = unet(**inputs)
    assert out.dtype == torch.bfloat16
    assert (out.float() - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize(
    ("config", "index", "millions"),
    [
        # MinImagen's own counts for the seed's base and for its Base and Super.
        ("pokemon_64", 0, 44.533635),
        ("pokemon_64_256", 0, 44.533635),
        ("pokemon_64_256", 1, None),
        ("imagen_64_256_1024", 0, None),
        ("imagen_64_256_1024", 1, None),
        ("imagen_64_256_1024", 2, None),
        ("cascade_64_256", 0, None),
        ("cascade_64_256", 1, None),
        ("emoji_demo", 0, None),
        ("emoji_demo", 1, None),
    ],
)
def test_every_shipped_network_builds(config, index, millions):
    checked = load_config(f"configs/{config}.json")
    with torch.device("meta"):
        unet = UNet(checked.stage(index + 1, 512).network)
    if millions:
        assert sum(p.numel() for p in unet.parameters()) == round(millions * 1e6)


@pytest.mark.parametrize(
    ("index", "parameters"), [(0, 1_618_334_979), (1, 715_727_235), (2, 704_968_835)]
)
def test_paper_sizes_have_minimagens_parameter_counts(index, parameters):
    """Counted on MinImagen's Base and Super (the third without self-attention), t5_base text."""
    checked = load_config("configs/imagen_64_256_1024.json")
    with torch.device("meta"):
        unet = UNet(checked.stage(index + 1, 768 if index == 0 else 512).network)
    assert abs(sum(p.numel() for p in unet.parameters()) - parameters) < 2e6
