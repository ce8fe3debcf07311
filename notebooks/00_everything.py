r"""Everything at once: a text-to-image diffusion model in one file, from faces to pictures that follow a sentence."""

# %% [markdown]
# # 00 Everything at once
#
# This one file is a whole text-to-image diffusion model. It draws its data, trains for a few minutes on two cores,
# and then draws faces that follow a sentence. All of it stands here, except the faces and their captions: those are
# imported, because they are data. The other notebooks take the parts one by one, and [ddpm/](../ddpm/unet.py) holds
# the full versions.
#
# The idea in two sentences: during training, a picture is mixed with noise, and a network learns to predict both from
# the mixture. To draw, the model starts from pure noise and removes a little of the predicted noise at a time.
#
# Three things are smaller here than in the package. A 2 x 2 patch of pixels takes the place of the VAE's latent
# (a smaller form of the picture, notebook 03). A small learned table of words takes the place of CLIP's text tower (a
# network that turns sentences into numbers, notebook 04), so a prompt may have only the words of the training
# captions. The pictures have 32 x 32 pixels.
#
# It is also a script: `python notebooks/00_everything.py` trains and writes `everything.png`.

# %%
import math
import os
import textwrap

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ddpm.celeba.captions import ATTRIBUTES, describe
from ddpm.celeba.faces import draw_face, drawn_rows

plt.rcParams["figure.dpi"] = 110
STEPS = int(os.environ.get("EVERYTHING_STEPS", 1500))  # of training; tests take fewer
T = 1000  # steps of the chain from picture to noise
torch.manual_seed(0)

# %% [markdown]
# ## 1. The data: faces and sentences
#
# Each face is drawn from a row of 40 attributes. Seven kinds of attribute are kept, so that a few minutes are enough
# to learn all of them. `describe` turns the same row into a sentence. Pixels are scaled to -1..1, because a network
# is easiest to train on numbers near 0.

# %%
KEPT = ["Male", "Young", "Smiling", "Eyeglasses", "Wearing_Hat", "No_Beard", "Bald"]
KEPT += ["Black_Hair", "Blond_Hair", "Brown_Hair", "Gray_Hair"]
COUNT = min(8000, 32 * STEPS)


def faces(count: int):
    r"""Pictures (count, 3, 32, 32) in [-1, 1] and their captions."""
    rows = drawn_rows(count, seed=0, per_row=1) * np.isin(ATTRIBUTES, KEPT)
    pictures = np.stack([draw_face(row, seed=[0, i], size=32) for i, row in enumerate(rows)])
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    return x, [describe(row) for row in rows]


def show(x, titles=None, columns=8):
    r"""Draw pictures (B, 3, 32, 32) in rows, each with its title."""
    rows = math.ceil(len(x) / columns)
    _, axes = plt.subplots(rows, columns, figsize=(1.25 * columns, 1.6 * rows), squeeze=False)
    for i, axis in enumerate(axes.flat):
        axis.axis("off")
        if i < len(x):
            axis.imshow(((x[i].clamp(-1, 1) + 1) / 2).permute(1, 2, 0), interpolation="nearest")
            if titles:
                axis.set_title(titles[i], fontsize=6)
    plt.tight_layout()


x_0, captions = faces(COUNT)
print(len(captions), "faces, for example:", captions[0])

# %% [markdown]
# A sentence becomes numbers: every word of the training captions has a place in a list, and its number is that place.
# Number 0 pads a sentence to the length of the longest. The empty sentence is all padding, and it stands for "no
# caption" below.

# %%
WORDS = ["", *sorted({word for caption in captions for word in caption.replace(",", "").split()})]
LONGEST = max(len(caption.split()) for caption in captions)


def numbers(sentences: list[str]):
    r"""Sentences -> (B, LONGEST) numbers of words; a word that no caption has is an error."""
    table = torch.zeros(len(sentences), LONGEST, dtype=torch.long)
    for row, sentence in zip(table, sentences, strict=True):
        for place, word in enumerate(sentence.replace(",", "").split()):
            row[place] = WORDS.index(word)
    return table


tokens = numbers(captions)
print(len(WORDS) - 1, "words, at most", LONGEST, "in a sentence")

# %% [markdown]
# ## 2. Forward: from picture to noise
#
# `alpha_bar[t]` sets how much of the picture is left after step t. It falls along a squared cosine from 1 to 0:
#
# $$x_t = \sqrt{\bar\alpha_t}\, x_0 + \sqrt{1 - \bar\alpha_t}\, \epsilon, \qquad \epsilon \sim \mathcal N(0, I)$$
#
# For example, at t = 500 both factors are about 0.7.

# %%
angle = (torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * math.pi / 2
beta = (1 - angle[1:].cos() ** 2 / angle[:-1].cos() ** 2).clamp(max=0.999)
alpha_bar = torch.cat([torch.cumprod(1 - beta, 0), torch.ones(1)]).float()  # index -1 is the clean picture


def at(t):
    r"""alpha_bar at the times t (B,), in a shape that multiplies pictures."""
    return alpha_bar[t].reshape(-1, 1, 1, 1)


def q_sample(x_0, t, eps):
    r"""The noisy picture x_t, all t steps at once."""
    return at(t).sqrt() * x_0 + (1 - at(t)).sqrt() * eps


def velocity(x_0, t, eps):
    r"""The network's target: v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0."""
    return at(t).sqrt() * eps - (1 - at(t)).sqrt() * x_0


def x_0_and_eps(x_t, t, v):
    r"""Picture and noise from v. Both equations hold because (x_t, v) is (x_0, eps) turned by an angle."""
    return at(t).sqrt() * x_t - (1 - at(t)).sqrt() * v, (1 - at(t)).sqrt() * x_t + at(t).sqrt() * v


# %% [markdown]
# The network predicts a mixture of both, the velocity
# $v = \sqrt{\bar\alpha_t}\, \epsilon - \sqrt{1 - \bar\alpha_t}\, x_0$.
# Why not the noise? At a large t the noise is easy to predict, because $x_t$ is almost only noise. To read the picture
# from a predicted noise, one divides by $\sqrt{\bar\alpha_t}$, which is small there. So a small error in the noise
# becomes a large one in the picture. To read the picture from v, nothing is divided.

# %% Eight pictures of one face, from clean to pure noise
t = torch.tensor([0, 150, 300, 450, 600, 750, 900, 999])
show(q_sample(x_0[:1].expand(8, -1, -1, -1), t, torch.randn(8, 3, 32, 32)), [f"t = {i}" for i in t.tolist()])

# %% [markdown]
# ## 3. The network: a UNet that attends to words
#
# A block combines each place with its neighbours by two 3 x 3 convolutions, and adds the result to its input. The
# time is added between the two, because the network must act differently on much and on little noise.
# `GroupNorm` brings groups of channels to mean 0 and variance 1. `SiLU`, x times sigmoid(x), is the nonlinearity.


# %%
def time_embedding(t, width):
    r"""Cosines and sines of t (B,) at width / 2 frequencies: (B, width)."""
    frequency = torch.exp(-math.log(10_000) * torch.arange(width // 2) / (width // 2))
    angle = t[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class Block(nn.Module):
    r"""(B, C_in, H, W) and the time's vector (B, D) -> (B, C_out, H, W)."""

    def __init__(self, c_in, c_out, d):
        super().__init__()
        self.conv1 = nn.Sequential(nn.GroupNorm(8, c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1))
        self.time = nn.Linear(d, c_out)
        self.conv2 = nn.Sequential(nn.GroupNorm(8, c_out), nn.SiLU(), nn.Conv2d(c_out, c_out, 3, padding=1))
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        nn.init.zeros_(self.conv2[2].weight)  # the block starts as its shortcut

    def forward(self, x, time):
        h = self.conv1(x) + self.time(time)[:, :, None, None]
        return self.shortcut(x) + self.conv2(h)


# %% [markdown]
# Attention gives every place a weighted mean over the words. Each place has a query q. Each word has a key k and a
# value v. The softmax turns the products of a query with all keys into weights that add up to 1, and the result is the
# mean of the values with these weights:
#
# $$\mathrm{softmax}\left(q k^\top / \sqrt d\right) v$$
#
# where d is how many numbers a query has. (This v is not the v that the network predicts.) For example, the places of
# the hair can put their weight on "blond". When the keys and values come from the places instead of the words, the
# layer is called self-attention. It lets the left eye match the right one.


# %%
def attention(q, k, v):
    r"""q (B, L, d), k and v (B, M, d) -> (B, L, d)."""
    weights = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(q.shape[2]), dim=2)  # (B, L, M)
    return weights @ v


class Attention(nn.Module):
    r"""Every place of x (B, C, H, W) attends to all places and to all words (B, M, D)."""

    def __init__(self, c, d):
        super().__init__()
        self.norm = nn.GroupNorm(8, c)
        self.q = nn.Linear(c, 2 * c, bias=False)
        self.of_places = nn.Linear(c, 2 * c, bias=False)
        self.of_words = nn.Linear(d, 2 * c, bias=False)
        self.out = nn.Linear(2 * c, c)
        nn.init.zeros_(self.out.weight)

    def forward(self, x, words):
        places = self.norm(x).flatten(2).transpose(1, 2)  # (B, H W, C)
        q_places, q_words = self.q(places).chunk(2, dim=2)
        h_places = attention(q_places, *self.of_places(places).chunk(2, dim=2))
        h_words = attention(q_words, *self.of_words(words).chunk(2, dim=2))
        h = self.out(torch.cat([h_places, h_words], dim=2))
        return x + h.transpose(1, 2).reshape(x.shape)


# %% [markdown]
# The UNet goes down from 16 x 16 to 4 x 4 places and up again. On the way up, each level also gets the map that the
# same level had on the way down, because 4 x 4 places are too few to keep the position of every edge. Two learned
# tables embed each word and its place in the sentence.


# %%
class UNet(nn.Module):
    r"""v = UNet(x_t, t, tokens): (B, 3, 32, 32), (B,), (B, LONGEST) -> (B, 3, 32, 32)."""

    def __init__(self, widths=(32, 64, 128), d=128):
        super().__init__()
        a, b, c = widths
        self.word = nn.Embedding(len(WORDS), d)
        self.place = nn.Embedding(LONGEST, d)
        self.time = nn.Sequential(nn.Linear(64, d), nn.SiLU(), nn.Linear(d, d), nn.SiLU())
        self.conv_in = nn.Conv2d(12, a, 3, padding=1)
        self.down = nn.ModuleList([Block(a, a, d), Block(a, b, d), Block(b, c, d)])
        self.middle = Block(c, c, d)
        self.up = nn.ModuleList([Block(2 * c, b, d), Block(2 * b, a, d), Block(2 * a, a, d)])
        self.read = nn.ModuleList([Attention(width, d) for width in (b, c, c, b, a)])
        self.conv_out = nn.Sequential(nn.GroupNorm(8, a), nn.SiLU(), nn.Conv2d(a, 12, 3, padding=1))

    def forward(self, x, t, tokens):
        time = self.time(time_embedding(t, 64))  # (B, D)
        words = self.word(tokens) + self.place.weight  # (B, LONGEST, D)
        h1 = self.down[0](self.conv_in(F.pixel_unshuffle(x, 2)), time)  # (B, a, 16, 16)
        h2 = self.read[0](self.down[1](F.avg_pool2d(h1, 2), time), words)  # (B, b, 8, 8)
        h3 = self.read[1](self.down[2](F.avg_pool2d(h2, 2), time), words)  # (B, c, 4, 4)
        h = self.read[2](self.middle(h3, time), words)
        h = self.up[0](torch.cat([h, h3], dim=1), time)  # (B, b, 4, 4)
        h = self.up[1](torch.cat([F.interpolate(self.read[3](h, words), scale_factor=2), h2], dim=1), time)
        h = self.up[2](torch.cat([F.interpolate(self.read[4](h, words), scale_factor=2), h1], dim=1), time)
        return F.pixel_shuffle(self.conv_out(h), 2)


unet = UNet()
print(f"{sum(p.numel() for p in unet.parameters()):,} parameters")

# %% [markdown]
# ## 4. Training
#
# A step takes 32 faces, gives each its own time and noise, and compares the prediction with v. One caption in ten is
# replaced by the empty one, so the same network also learns to draw without a caption. The learning rate falls to 0 at
# the end, which averages out the last steps' noise. AdamW is gradient descent that divides the step of each weight by
# the usual size of its gradient.


# %%
def loss_of(unet, x_0, tokens):
    r"""Mean of (v - v_hat)^2 over a batch."""
    t = torch.randint(T, (len(x_0),))
    eps = torch.randn_like(x_0)
    dropped = torch.rand(len(x_0), 1) < 0.1
    v_hat = unet(q_sample(x_0, t, eps), t, tokens.masked_fill(dropped, 0))
    return F.mse_loss(v_hat, velocity(x_0, t, eps))


def train(unet, steps: int, rate: float = 2e-3) -> list[float]:
    r"""Train for so many steps; the loss of each."""
    opt = torch.optim.AdamW(unet.parameters(), betas=(0.9, 0.99), weight_decay=0.01)
    losses = []
    for step in range(steps):
        opt.param_groups[0]["lr"] = rate * min((step + 1) / 50, 1 - step / steps)
        batch = torch.randint(len(x_0), (32,))
        loss = loss_of(unet, x_0[batch], tokens[batch])
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return losses


losses = train(unet, STEPS)
print(f"mean loss: first 20 steps {np.mean(losses[:20]):.3f}, last 50 {np.mean(losses[-50:]):.3f}")

# %% The loss over the steps, falling on a logarithmic axis
plt.figure(figsize=(6, 2.5))
plt.semilogy(losses, lw=0.5)
plt.xlabel("step"), plt.ylabel("loss")
plt.show()

# %% [markdown]
# ## 5. Drawing: guidance and DDIM
#
# Guidance makes two predictions, one with the caption and one without. It starts at the prediction without the caption
# and adds s times the difference of the two:
#
# $$\hat v = v_\varnothing + s\,(v_c - v_\varnothing)$$
#
# For example, s = 1 gives the prediction with the caption. With s = 3 a picture follows its caption more strongly than
# the training pictures follow theirs.
#
# A step of DDIM goes from time t to an earlier time, which papers call s too. From here on s is this time, and `scale`
# in the code is that of guidance. The prediction gives a picture and a noise. The step mixes the same two again, with
# the smaller amount of noise that belongs to s:
#
# $$x_s = \sqrt{\bar\alpha_s}\, \hat x_0 + \sqrt{1 - \bar\alpha_s}\, \hat\epsilon$$


# %%
def guided(unet, x_t, t, tokens, scale):
    r"""The prediction of v, led from the empty caption past the given one."""
    both = unet(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([torch.zeros_like(tokens), tokens]))
    without, with_caption = both.chunk(2)
    return without + scale * (with_caption - without)


def ddim_step(x_t, t, s, v):
    r"""From x_t to x_s; s = -1 is the clean picture."""
    x_0, eps = x_0_and_eps(x_t, t, v)
    return at(s).sqrt() * x_0 + (1 - at(s)).sqrt() * eps


@torch.no_grad()
def sample(unet, sentences, steps=25, scale=3.0, seed=0):
    r"""Pictures (B, 3, 32, 32) that follow the sentences, and the states on the way."""
    tokens = numbers(sentences)
    x = torch.randn(len(sentences), 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    states = [x]
    times = [round(T - k * T / steps) - 1 for k in range(steps)] + [-1]
    for t, s in zip(times, times[1:], strict=False):
        t = torch.full((len(x),), t)
        s = torch.full((len(x),), s)
        x = ddim_step(x, t, s, guided(unet, x, t, tokens, scale))
        states.append(x)
    return x, states


# %% Sixteen faces in two rows, four for each of four prompts
PROMPTS = [
    "a smiling young woman with blond hair",
    "a bald young man, wearing eyeglasses",
    "an older woman with gray hair, wearing eyeglasses",
    "a smiling young man with black hair, wearing a hat",
]
asked = [prompt for prompt in PROMPTS for _ in range(4)]
drawn, states = sample(unet, asked)
show(drawn, [textwrap.fill(prompt, 24) for prompt in asked], columns=8)
plt.savefig("everything.png") if "__file__" in globals() else plt.show()

# %% [markdown]
# The loss falls from 0.62 to 0.10. Hair and hats follow the sentences, and mostly eyeglasses too: all four women of the
# first prompt are blond, and all four men of the last wear a dark hat. Baldness is learned worse: the second man has
# hair and no eyeglasses that one can see, and the third a dark patch. A smile takes a few pixels and can hardly be
# seen. Every picture is grainy, because five minutes of training are short.
# [Notebook 07](07_sampling_and_guidance.ipynb) draws with a model of 64 x 64 pixels that trained for longer.
#
# ## Exercises
#
# Their solutions have a [file of their own](solutions.md#00-everything-at-once).
#
# **1.** Draw the first prompt with a guidance `scale` of 0, 1, 3 and 10. What does each value give?
#
# **2.** Write DDPM's step. It is a DDIM step to s, but a part of the noise is new. The new noise has the variance
# $(1 - \bar\alpha_s) / (1 - \bar\alpha_t) \cdot (1 - \bar\alpha_t / \bar\alpha_s)$. How much of the old noise may
# stay, so that the sum has the variance $1 - \bar\alpha_s$? From how many steps on are the pictures sharp?
