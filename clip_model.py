"""A compact CLIP: byte-pair tokenizer, image and text tower, and the weights that people have.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision" (arXiv 2103.00020).
Letters: N texts or images, L tokens (words, or patches + class), D joint width, R image side, W tower width.
The parameters carry OpenAI's names, so a state dict of theirs is a state dict of ours.
"""
import gzip
import html
import math
from collections import Counter, defaultdict

import ftfy
import regex
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's own, of RGB in 0..1


class WeightsError(ValueError):
    """Weights or a vocabulary that can't be had or used; one line: what, where, what to do."""


# ---------------------------------------------------------------------------------------------------------- tokenizer
# OpenAI's expression also finds the two markers in a caption's own words; here (as in open_clip) those are text like
# any other, so that no caption can end itself early.
WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)
CLIP_MERGES = 48894  # CLIP's vocabulary file lists 262,144 merges; these many are used, the rest never were


def byte_letters():
    """One printable letter for each of the 256 bytes, in the order of the vocabulary (GPT-2's): dict byte -> letter."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(rest)}


LETTER = byte_letters()
BYTE = {letter: b for b, letter in LETTER.items()}


def split_words(text):
    """CLIP's cleaning and splitting: broken unicode mended, HTML unescaped twice, one space, lower case -> words."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return WORDS.findall(" ".join(text.split()).lower())


def spell(word):
    """"hi" -> ("h", "i</w>"): one symbol per byte, the last one marked as the end of the word."""
    letters = [LETTER[b] for b in word.encode("utf-8", errors="replace")]  # a lone surrogate is no text: "?"
    return (*letters[:-1], letters[-1] + "</w>")


def join(symbols, pair):
    """Join every occurrence of a pair of neighbours, from the left: ("a","b","a","b"), ("a","b") -> ("ab","ab")."""
    joined, i = [], 0
    while i < len(symbols):
        here = symbols[i:i + 2] == pair
        joined.append(pair[0] + pair[1] if here else symbols[i])
        i += 2 if here else 1
    return tuple(joined)


class Tokenizer:
    """Byte-pair encoding with CLIP's rules; any text has ids and comes back from them, lower-cased and cleaned.

    merges: "left right" strings, most important first, as in CLIP's vocabulary file; () is byte-level, without a file.
    Ids: 256 bytes, 256 bytes that end a word, the merges, start of text, end of text (hence the largest id).
    """

    def __init__(self, merges=(), context_length=77):
        self.merges, self.context_length = tuple(merges), context_length
        pairs = [tuple(m.split(" ")) for m in self.merges]
        bad = next((m for m, p in zip(self.merges, pairs) if len(p) != 2 or not all(p)), None)
        if bad is not None:
            raise WeightsError(f"{bad!r} is no merge of a vocabulary: expected two symbols with a space between them")
        self.symbols = [*BYTE, *(letter + "</w>" for letter in BYTE), *(a + b for a, b in pairs)]
        self.symbols += ["<|startoftext|>", "<|endoftext|>"]
        self.ids = {symbol: i for i, symbol in enumerate(self.symbols)}
        self.rank = {pair: i for i, pair in enumerate(pairs)}
        self.vocab_size = len(self.symbols)
        self.start, self.end = self.vocab_size - 2, self.vocab_size - 1
        self.known = {}  # word -> ids; captions repeat their words

    @classmethod
    def from_file(cls, path, context_length=77):
        """CLIP's bpe_simple_vocab_16e6.txt.gz -> Tokenizer; the first line is a header."""
        try:
            with gzip.open(path, "rt", encoding="utf-8") as file:
                merges = file.read().split("\n")[1:CLIP_MERGES + 1]
        except (OSError, EOFError, UnicodeDecodeError, gzip.zlib.error) as error:
            raise WeightsError(f"{path}: not a readable vocabulary (gzip, one merge a line): {error}") from None
        if len(merges) < CLIP_MERGES:
            raise WeightsError(f"{path}: {len(merges)} merges, CLIP's vocabulary has {CLIP_MERGES}; get the file again")
        return cls(merges, context_length)

    @classmethod
    def learn(cls, texts, merges, context_length=77):
        """Train on texts: join the most frequent pair, `merges` times or until no pair occurs twice -> Tokenizer."""
        words = Counter()
        for text, n in Counter(texts).items():
            for word in split_words(text):
                words[word] += n
        spelling = {word: spell(word) for word in words}
        count, where = Counter(), defaultdict(set)  # of each pair: how often, in which words
        for word, symbols in spelling.items():
            for pair in zip(symbols, symbols[1:]):
                count[pair] += words[word]
                where[pair].add(word)
        learnt = []
        while len(learnt) < merges and count:
            best = max(count, key=lambda pair: (count[pair], pair))  # ties: by the pair itself
            if count[best] < 2:
                break
            learnt.append(" ".join(best))
            for word in where.pop(best):
                old, new = spelling[word], join(spelling[word], best)
                for pair in zip(old, old[1:]):
                    count[pair] -= words[word]
                for pair in zip(new, new[1:]):
                    count[pair] += words[word]
                    where[pair].add(word)
                spelling[word] = new
            del count[best]
        return cls(learnt, context_length)

    def encode_word(self, word):
        """Join the pair of neighbours with the lowest rank until none is left -> list of ids."""
        if word not in self.known:
            symbols = spell(word)
            while len(symbols) > 1:
                pair = min(zip(symbols, symbols[1:]), key=lambda p: self.rank.get(p, math.inf))
                if pair not in self.rank:
                    break
                symbols = join(symbols, pair)
            self.known[word] = [self.ids[s] for s in symbols]
        return self.known[word]

    def encode(self, text):
        """Text -> list of ids, without start and end."""
        return [i for word in split_words(text) for i in self.encode_word(word)]

    def decode(self, ids):
        """Ids (list or row of a batch) -> cleaned text; what follows the end of text is padding."""
        ids = [int(i) for i in ids]
        ids = ids[:ids.index(self.end)] if self.end in ids else ids
        letters = "".join(self.symbols[i] for i in ids if i != self.start).replace("</w>", " ")
        text = bytes(ord(" ") if c == " " else BYTE[c] for c in letters)
        return text.decode("utf-8", errors="replace").strip()

    def __call__(self, texts):
        """Texts -> ids (N,L), zero-padded to the longest, which is exact in a causal tower; too long: cut, end kept."""
        texts = [texts] if isinstance(texts, str) else texts
        rows = [[self.start, *self.encode(text)[:self.context_length - 2], self.end] for text in texts]
        ids = torch.zeros(len(rows), max(map(len, rows), default=2), dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, :len(row)] = torch.tensor(row)
        return ids


# -------------------------------------------------------------------------------------------------------------- towers
class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), OpenAI's approximation of GELU: their weights need it."""

    def forward(self, x):
        return F.silu(1.702 * x).div_(1.702)  # silu(z) = z sigmoid(z) keeps one large tensor for backward, not two


class Attention(nn.Module):
    """Self-attention, x (N,L,W) -> (N,L,W), or the first Q tokens' (N,Q,W); nn.MultiheadAttention's parameter names."""

    def __init__(self, width, heads):
        super().__init__()
        if width % heads:
            raise WeightsError(f"a tower of width {width} doesn't split into {heads} heads; choose a multiple of 64")
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.randn(3 * width, width) * width ** -0.5)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x, causal, Q):
        N, L, W = x.shape
        q = F.linear(x[:, :Q], self.in_proj_weight[:W], self.in_proj_bias[:W])
        q = q.unflatten(-1, (self.heads, -1)).transpose(1, 2)                        # (N,heads,Q,W/heads)
        kv = F.linear(x, self.in_proj_weight[W:], self.in_proj_bias[W:])
        k, v = kv.view(N, L, 2, self.heads, W // self.heads).permute(2, 0, 3, 1, 4)  # (N,heads,L,W/heads) each
        o = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out_proj(o.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm residual block, x (N,L,W) -> (N,L,W), or the first Q tokens' (N,Q,W)."""

    def __init__(self, width, heads, layers, act):
        super().__init__()
        self.attn, self.ln_1, self.ln_2 = Attention(width, heads), nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.c_fc, self.mlp.gelu, self.mlp.c_proj = nn.Linear(width, 4 * width), act(), nn.Linear(4 * width, width)
        for out in (self.attn.out_proj, self.mlp.c_proj):  # smaller with depth: the residual sum keeps its size (GPT-2)
            nn.init.normal_(out.weight, std=(2 * layers * width) ** -0.5)
            nn.init.zeros_(out.bias)
        nn.init.normal_(self.mlp.c_fc.weight, std=(2 * width) ** -0.5)

    def forward(self, x, causal=False, Q=None):
        x = x[:, :Q] + self.attn(self.ln_1(x), causal, Q)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks, x (N,L,W) -> (N,L,W), or the first Q tokens' (N,Q,W): the last block leaves out the rest."""

    def __init__(self, width, heads, layers, act):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, layers, act) for _ in range(layers))

    def forward(self, x, causal=False, Q=None, grad_checkpoint=False):
        for block in self.resblocks:
            args = x, causal, Q if block is self.resblocks[-1] else None
            again = grad_checkpoint and torch.is_grad_enabled()
            x = checkpoint(block, *args, use_reentrant=False) if again else block(*args)
        return x


def heads_of(width):
    """Heads of a tower: 64 numbers each, as in all of OpenAI's; a state dict can't tell."""
    return max(1, width // 64)


class VisionTransformer(nn.Module):
    """Images (N,3,R,R), normalised -> (N,D), the class token's."""

    def __init__(self, embed_dim, image_size, patch_size, width, layers, act):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * width ** -0.5)
        tokens = (image_size // patch_size) ** 2 + 1
        self.positional_embedding = nn.Parameter(torch.randn(tokens, width) * width ** -0.5)
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        # ViT-H/14 (open_clip, HF) is the one common tower of this kind whose heads are wider than 64
        self.transformer = Transformer(width, 16 if width == 1280 else heads_of(width), layers, act)
        self.proj = nn.Parameter(torch.randn(width, embed_dim) * width ** -0.5)

    def forward(self, x, grad_checkpoint=False):
        if torch.is_autocast_enabled("cpu") and x.is_cpu:  # bfloat16 convolutions go backward 10 times slower
            (N, _, R, _), P = x.shape, self.conv1.kernel_size[0]
            x = x[..., :R // P * P, :R // P * P].unflatten(3, (-1, P)).unflatten(2, (-1, P))  # (N,3,rows,P,columns,P)
            x = x.permute(0, 2, 4, 1, 3, 5).reshape(N, -1, 3 * P * P)
            x = F.linear(x, self.conv1.weight.flatten(1))  # the same sums
        else:
            x = self.conv1(x).flatten(2).transpose(1, 2)  # (N,patches,W)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        x = self.transformer(self.ln_pre(x), Q=1, grad_checkpoint=grad_checkpoint)  # only the class token is read
        return self.ln_post(x[:, 0]) @ self.proj


class CLIP(nn.Module):
    """CLIP with a vision transformer; CLIP(**clip.config) is another. grad_checkpoint=True saves memory in training."""

    def __init__(self, embed_dim, image_size, patch_size, vision_width, vision_layers, context_length, vocab_size,
                 text_width, text_layers, quick_gelu=True):
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        self.grad_checkpoint = False
        act = QuickGELU if quick_gelu else nn.GELU
        self.visual = VisionTransformer(embed_dim, image_size, patch_size, vision_width, vision_layers, act)
        self.transformer = Transformer(text_width, heads_of(text_width), text_layers, act)
        self.token_embedding = nn.Embedding(vocab_size, text_width)
        self.positional_embedding = nn.Parameter(torch.randn(context_length, text_width) * 0.01)
        self.ln_final = nn.LayerNorm(text_width)
        self.text_projection = nn.Parameter(torch.randn(text_width, embed_dim) * text_width ** -0.5)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        for name, values in (("mean", MEAN), ("std", STD)):  # on the CPU even where parameters are built without memory
            self.register_buffer(name, torch.tensor(values, device="cpu").view(3, 1, 1), persistent=False)

    def encode_image(self, x):
        """Images (N,3,R,R) -> (N,D), not normalised. uint8 pixels are normalised here; floats are taken as they are."""
        if x.dtype == torch.uint8:
            x = (x.to(self.mean.dtype) / 255 - self.mean) / self.std
        return self.visual(x, self.grad_checkpoint)

    def encode_text(self, ids):
        """Ids (N,L) -> (N,D) at the end of text (largest id), not normalised. Causal: tokens after it don't matter."""
        x = self.token_embedding(ids) + self.positional_embedding[:ids.shape[1]]
        x = self.transformer(x, causal=True, grad_checkpoint=self.grad_checkpoint)
        x = x[torch.arange(len(ids), device=ids.device), ids.argmax(-1)]
        return self.ln_final(x) @ self.text_projection

    @classmethod
    def from_state_dict(cls, sd, quick_gelu=True):
        """State dict with OpenAI's names -> CLIP in float32; every size is read off the shapes. Strict."""
        sizes = ("input_resolution", "context_length", "vocab_size")  # entries of OpenAI's archives
        sd = {k: v for k, v in sd.items() if k not in sizes}
        try:
            (L, text_width), (W, _, P, _) = sd["positional_embedding"].shape, sd["visual.conv1.weight"].shape
            grid = math.isqrt(sd["visual.positional_embedding"].shape[0] - 1)
            embed_dim, vocab_size = sd["text_projection"].shape[1], sd["token_embedding.weight"].shape[0]
        except (KeyError, ValueError, AttributeError, IndexError) as error:
            raise WeightsError(f"not a CLIP with a vision transformer: {error} is missing or has another form; "
                               f"found {listed(sd)}") from None
        layers = [len({k.split(".")[n] for k in sd if k.startswith(p)})
                  for n, p in ((3, "visual.transformer.resblocks."), (2, "transformer.resblocks."))]
        with torch.device("meta"):  # no memory, no random numbers: the weights are given
            clip = cls(embed_dim, grid * P, P, W, layers[0], L, vocab_size, text_width, layers[1], quick_gelu)
        sd = {k: v.to(torch.float32, copy=True) for k, v in sd.items()}
        load_strictly(clip, sd, "a CLIP with a vision transformer")
        return clip


def load_strictly(module, sd, what):
    """The tensors become the module's own, whatever it held; what doesn't fit is one WeightsError."""
    ours = module.state_dict()
    for fault, keys in (("missing", ours.keys() - sd.keys()), ("unknown", sd.keys() - ours.keys()),
                        ("of another size", [k for k in ours if k in sd and ours[k].shape != sd[k].shape])):
        if keys:
            raise WeightsError(f"weights that don't fit {what}, {fault}: {listed(keys)}")
    module.load_state_dict(sd, assign=True)


def listed(keys, most=8):
    """Keys -> one line with the first few of them."""
    keys = sorted(map(str, keys))
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "") if keys else "nothing"
