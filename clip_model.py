"""A compact CLIP: byte-pair tokenizer, image tower, text tower.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision"
(arXiv 2103.00020). The parameters have OpenAI's names, so OpenAI's state dicts load unchanged.

    N texts or images   L tokens   W width of a tower   H heads   D joint width   P image side

    captions -> Tokenizer   ids (N,L)        -> encode_text    (N,D)
                            images (N,3,P,P) -> encode_image   (N,D)
"""
import functools
import gzip
import html
import math
from collections import Counter, defaultdict
from itertools import pairwise

import ftfy
import regex
import torch
import torch.nn.functional as F
from torch import nn

# RGB statistics of CLIP's training images, for values in 0..1.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


# ---- tokenizer ----

# CLIP's vocabulary file lists 262,144 merges, but CLIP uses only the first of them.
CLIP_MERGES = 48894
# OpenAI's expression also matches "<|endoftext|>" in a caption. Here, as in open_clip, it is
# ordinary text, so that a caption cannot end early.
WORD = regex.compile(
    r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)


# Each byte is represented by one printable character, in the order of CLIP's vocabulary.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [*range(33), *range(127, 161), 173]
CHARACTERS = map(chr, [*PRINTABLE, *range(256, 256 + len(OTHERS))])
SYMBOL = dict(zip(PRINTABLE + OTHERS, CHARACTERS))  # byte -> character
BYTE = {symbol: b for b, symbol in SYMBOL.items()}


def split_words(text):
    """Clean a text as CLIP does (fix Unicode, unescape HTML, lowercase) and split it. -> words"""
    text = ftfy.fix_text(text)
    text = html.unescape(html.unescape(text))
    text = " ".join(text.split())
    return WORD.findall(text.lower())


def spell(word):
    """One symbol per byte, the last one marked as the end of the word: "hi" -> ["h", "i</w>"]."""
    # A lone surrogate (from a file name that is not UTF-8) can't be encoded: it becomes "?".
    symbols = [SYMBOL[b] for b in word.encode("utf-8", errors="replace")]
    symbols[-1] += "</w>"
    return symbols


def join(symbols, pair):
    """Merge each occurrence of a pair, from the left: ["a","b","a"], ("a","b") -> ["ab","a"]."""
    joined = []
    for symbol in symbols:
        if joined and (joined[-1], symbol) == pair:
            joined[-1] += symbol
        else:
            joined.append(symbol)
    return joined


class Tokenizer:
    """CLIP's byte-pair encoding: texts -> ids (N,L). Any text can be encoded.

    merges: "left right" strings in order of priority, as in CLIP's vocabulary file. Without merges,
    each byte has one id, and no file is needed.
    The order of the ids: 256 bytes, 256 bytes that end a word, merges, start of text, end of text.
    """

    def __init__(self, merges=(), context_length=77):
        self.merges = tuple(merges)
        self.context_length = context_length
        self.symbols = [*BYTE, *(symbol + "</w>" for symbol in BYTE)]
        self.rank = {}
        for merge in self.merges:
            pair = tuple(merge.split())
            if len(pair) != 2:
                raise ValueError(f"{merge!r} is no merge: expected two symbols separated by "
                                 "a space")
            self.rank[pair] = len(self.symbols)
            self.symbols.append("".join(pair))
        self.start = len(self.symbols)
        self.end = self.start + 1  # the largest id: the text tower finds it by argmax
        self.symbols += ["<|startoftext|>", "<|endoftext|>"]
        self.vocab_size = len(self.symbols)
        self.ids = {symbol: i for i, symbol in enumerate(self.symbols)}

    @classmethod
    def from_file(cls, path, context_length=77):
        """Read CLIP's bpe_simple_vocab_16e6.txt.gz. -> Tokenizer"""
        with gzip.open(path, "rt", encoding="utf-8") as file:
            lines = file.read().split("\n")
        merges = lines[1:CLIP_MERGES + 1]  # the first line is a header
        if len(merges) < CLIP_MERGES:
            raise ValueError(f"{path}: {len(merges)} merges, CLIP's vocabulary has {CLIP_MERGES}: "
                             "download the file again")
        return cls(merges, context_length)

    @classmethod
    def learn(cls, texts, merges, context_length=77):
        """Learn merges from texts, the most frequent pair first. -> Tokenizer

        Stops after `merges` merges, or when no pair occurs at least twice.
        """
        frequency = Counter(word for text in texts for word in split_words(text))
        spelling = {word: spell(word) for word in frequency}
        count = Counter()
        words_with = defaultdict(set)  # a merge changes few words: recounting all is far slower

        def add(word, times):
            for pair in pairwise(spelling[word]):
                count[pair] += times
                words_with[pair].add(word)

        for word in frequency:
            add(word, frequency[word])
        learnt = []
        while len(learnt) < merges and count:
            best = max(count, key=lambda pair: (count[pair], pair))
            if count[best] < 2:
                break
            learnt.append(" ".join(best))
            for word in words_with.pop(best):
                add(word, -frequency[word])
                spelling[word] = join(spelling[word], best)
                add(word, frequency[word])
            del count[best]
        return cls(learnt, context_length)

    @functools.cache  # captions repeat their words
    def encode_word(self, word):
        """Merge neighbours, the pair of lowest rank first, while any pair has a rank. -> ids"""
        symbols = spell(word)
        while pairs := [pair for pair in pairwise(symbols) if pair in self.rank]:
            symbols = join(symbols, min(pairs, key=self.rank.get))
        return [self.ids[symbol] for symbol in symbols]

    def encode(self, text):
        """A text -> list of its ids, without start and end of text."""
        return [i for word in split_words(text) for i in self.encode_word(word)]

    def decode(self, ids):
        """Ids (L,) -> the cleaned text. Everything after the end of text is padding."""
        symbols = []
        for i in ids:
            if i == self.end:
                break
            if i != self.start:
                symbols.append(self.symbols[i])
        text = "".join(symbols).replace("</w>", " ")
        text = bytes(BYTE.get(symbol, ord(" ")) for symbol in text)
        return text.decode("utf-8", errors="replace").strip()

    def __call__(self, texts):
        """Texts -> ids (N,L). A text that is too long is truncated, but keeps its end of text.

        Rows are padded with 0 to the longest text, not to the context length: because the text
        tower is causal, padding does not change its output.
        """
        if isinstance(texts, str):
            texts = [texts]
        room = self.context_length - 2
        rows = [[self.start, *self.encode(text)[:room], self.end] for text in texts]
        longest = max(map(len, rows), default=2)
        rows = [row + [0] * (longest - len(row)) for row in rows]
        return torch.tensor(rows, dtype=torch.long).view(-1, longest)


# ---- the two towers ----

def normal(*shape, std):
    """A parameter that starts as N(0, std^2)."""
    return nn.Parameter(torch.randn(shape) * std)


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the activation that OpenAI's weights were trained with."""

    def forward(self, x):
        # Written with silu, so that autograd keeps one large tensor instead of two.
        return F.silu(1.702 * x).div_(1.702)


def take(x, index):
    """Select one token per row. x (N,L,...), index (N,) -> (N,1,...)"""
    return x[torch.arange(len(x), device=x.device), index][:, None]


class Attention(nn.Module):
    """Multi-head self-attention. x (N,L,W) -> (N,L,W).

    With index (N,), only the output of one token per row is computed. -> (N,1,W)
    """

    def __init__(self, width, heads):
        super().__init__()
        if width % heads:
            raise ValueError(f"a tower of width {width} can't be split into {heads} heads: "
                             "choose a multiple of 64")
        self.heads = heads
        self.in_proj_weight = normal(3 * width, width, std=width ** -0.5)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x, causal, index=None):
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)           # (N,L,3W)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).unbind(2)          # (N,L,H,W/H) each
        mask = None                                                         # True: attended to
        if index is not None:
            q = take(q, index)                                              # (N,1,H,W/H)
            if causal:
                position = torch.arange(x.shape[1], device=x.device)
                mask = position <= index[:, None, None, None]               # (N,1,1,L)
                causal = False
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))                    # (N,H,L,W/H) each
        o = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
        return self.out_proj(o.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """One layer: attention, then an MLP. x (N,L,W) -> (N,L,W), or with index (N,) -> (N,1,W)."""

    def __init__(self, width, heads, layers, activation, mlp):
        super().__init__()
        self.attn = Attention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.c_fc = nn.Linear(width, mlp)
        self.mlp.gelu = activation()
        self.mlp.c_proj = nn.Linear(mlp, width)
        # As in GPT-2, layers that add to the residual stream start smaller in a deeper tower.
        for layer in (self.attn.out_proj, self.mlp.c_proj):
            nn.init.normal_(layer.weight, std=(2 * layers * width) ** -0.5)
            nn.init.zeros_(layer.bias)
        nn.init.normal_(self.mlp.c_fc.weight, std=(2 * width) ** -0.5)

    def forward(self, x, causal, index=None):
        attended = self.attn(self.ln_1(x), causal, index)
        if index is not None:
            x = take(x, index)
        x = x + attended
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks that returns one token per row. x (N,L,W), index (N,) -> (N,W)."""

    def __init__(self, width, heads, layers, activation, mlp):
        super().__init__()
        self.resblocks = nn.ModuleList(
            Block(width, heads, layers, activation, mlp) for _ in range(layers))

    def forward(self, x, index, causal=False):
        last = self.resblocks[-1]
        for block in self.resblocks:
            # The last block computes only the token that is returned. In train.py, this saves a
            # sixth of the time of a warm-up step.
            only = index if block is last else None
            x = block(x, causal, only)
        return x[:, 0]


class VisionTransformer(nn.Module):
    """The image tower. Normalised images (N,3,P,P) -> embedding of the class token (N,D)."""

    def __init__(
        self, embed_dim, image_size, patch_size, width, heads, layers, activation, mlp
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.class_embedding = normal(width, std=width ** -0.5)
        tokens = (image_size // patch_size) ** 2 + 1
        self.positional_embedding = normal(tokens, width, std=width ** -0.5)
        self.ln_pre = nn.LayerNorm(width)
        self.ln_post = nn.LayerNorm(width)
        self.transformer = Transformer(width, heads, layers, activation, mlp)
        self.proj = normal(width, embed_dim, std=width ** -0.5)

    def forward(self, images):
        p, _ = self.conv1.kernel_size
        patches = images.unfold(2, p, p).unfold(3, p, p)             # (N,3,rows,columns,p,p)
        patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3)       # (N,rows,columns,3*p*p)
        # conv1 as a matrix product: on a CPU, the backward pass of a convolution in bfloat16 is 10
        # times slower.
        x = F.linear(patches, self.conv1.weight.flatten(1))          # (N,rows,columns,W)
        class_token = self.class_embedding.expand(len(x), 1, -1)     # (N,1,W)
        x = torch.cat([class_token, x.flatten(1, 2)], dim=1)         # (N,L,W)
        x = self.ln_pre(x + self.positional_embedding)
        first = torch.zeros(len(x), dtype=torch.long, device=x.device)
        x = self.transformer(x, first)                               # (N,W)
        return self.ln_post(x) @ self.proj


def heads_of(width):
    """Number of heads of a tower. State dicts don't record it; heads are usually 64 wide."""
    return max(1, width // 64)


NO_SETTINGS = ("self", "unusual", "__class__")  # locals of CLIP.__init__ that are not settings


class CLIP(nn.Module):
    """CLIP with a vision transformer. CLIP(**clip.config) builds another one of the same sizes.

    quick_gelu: whether the activation is QuickGELU (OpenAI's) or GELU (most others').
    unusual: settings that default to OpenAI's values: vision_heads and text_heads; vision_mlp and
    text_mlp, the widths inside the MLPs; norm_eps; mean and std, which normalise the pixels;
    resize, the mode and interpolation of data.test_transform.
    """

    def __init__(
        self,
        embed_dim,
        image_size,
        patch_size,
        vision_width,
        vision_layers,
        context_length,
        vocab_size,
        text_width,
        text_layers,
        quick_gelu=True,
        **unusual,
    ):
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in NO_SETTINGS}
        usual = dict(
            # Image towers beyond ViT-L (H, g, bigG, e) have wider heads, not more of them.
            vision_heads=min(16, heads_of(vision_width)),
            text_heads=heads_of(text_width),
            vision_mlp=4 * vision_width,
            text_mlp=4 * text_width,
            norm_eps=1e-5,
            mean=MEAN,
            std=STD,
            resize=("shortest", "bicubic"),
        )
        if unknown := unusual.keys() - usual.keys():
            raise TypeError(f"CLIP has no setting {', '.join(unknown)}")
        self.config |= {k: v for k, v in unusual.items() if v != usual[k]}
        settings = usual | unusual
        self.embed_dim = embed_dim
        self.image_size = image_size
        self.resize = settings["resize"]
        activation = QuickGELU if quick_gelu else nn.GELU
        self.visual = VisionTransformer(
            embed_dim,
            image_size,
            patch_size,
            vision_width,
            settings["vision_heads"],
            vision_layers,
            activation,
            settings["vision_mlp"],
        )
        self.transformer = Transformer(
            text_width,
            settings["text_heads"],
            text_layers,
            activation,
            settings["text_mlp"],
        )
        self.token_embedding = nn.Embedding(vocab_size, text_width)
        self.positional_embedding = normal(context_length, text_width, std=0.01)
        self.ln_final = nn.LayerNorm(text_width)
        self.text_projection = normal(text_width, embed_dim, std=text_width ** -0.5)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = settings["norm_eps"]
        # On the CPU even if from_state_dict builds the parameters on the meta device.
        mean_std = torch.tensor([settings["mean"], settings["std"]], device="cpu").view(2, 3, 1, 1)
        self.register_buffer("mean_std", mean_std, persistent=False)

    def encode_image(self, images):
        """images (N,3,P,P), uint8 or normalised float -> (N,D)."""
        if images.dtype == torch.uint8:
            mean, std = self.mean_std
            images = (images / 255 - mean) / std
        return self.visual(images)

    def encode_text(self, ids):
        """ids (N,L) -> (N,D), from the end-of-text token. Tokens after it have no effect."""
        x = self.token_embedding(ids)                                      # (N,L,W)
        x = x + self.positional_embedding[:ids.shape[1]]
        end = ids.argmax(-1)                                               # (N,)
        x = self.transformer(x, end, causal=True)                          # (N,W)
        return self.ln_final(x) @ self.text_projection

    @classmethod
    def from_state_dict(cls, sd, **settings):
        """State dict with OpenAI's names -> CLIP in float32; its shapes give the sizes."""
        with torch.device("meta"):  # the weights are given: no memory or random numbers needed
            clip = cls(**sizes_of(sd) | settings)
        sd = {name: x.float().clone() for name, x in sd.items()}
        clip.load_state_dict(sd, assign=True)
        return clip


def sizes_of(sd):
    """Infer sizes from the shapes in a state dict with OpenAI's names. -> dict of CLIP arguments"""
    tokens, vision_width = sd["visual.positional_embedding"].shape
    patch_size = sd["visual.conv1.weight"].shape[-1]
    context_length, text_width = sd["positional_embedding"].shape
    _, embed_dim = sd["text_projection"].shape
    blocks = [name for name in sd if name.endswith(".ln_1.weight")]
    vision_layers = len([name for name in blocks if name.startswith("visual.")])
    return dict(
        embed_dim=embed_dim,
        image_size=math.isqrt(tokens) * patch_size,  # tokens: the patches and the class
        patch_size=patch_size,
        vision_width=vision_width,
        vision_layers=vision_layers,
        context_length=context_length,
        vocab_size=len(sd["token_embedding.weight"]),
        text_width=text_width,
        text_layers=len(blocks) - vision_layers,
        vision_mlp=len(sd["visual.transformer.resblocks.0.mlp.c_fc.weight"]),
        text_mlp=len(sd["transformer.resblocks.0.mlp.c_fc.weight"]),
    )
