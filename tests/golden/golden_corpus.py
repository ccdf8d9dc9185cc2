"""Texts that are hard on a tokenizer, and prompts for the story model."""

import json
import random

# Each entry is encoded twice: once with special tokens recognised, once with them as plain text.
NASTY = [
    "",
    " ",
    "a",
    "Hello, world!",
    "Once upon a time, there was a little girl named Lily.",
    # Contractions, in both cases, with the long s that folds to s, and with look-alikes.
    "I'm you're he's we'll they'd I've don't CAN'T WE'LL I'M YOU'RE HE'D I'VE it'S",
    "'s't're've'm'll'd 'S'T'RE'VE'M'LL'D 'x 'sx 'tis 'llama 'rex 'very '' ''' 'ſ x'ſy 'ſs '\u212a it’s don’t",
    "rock'n'roll o'clock 'l 'r 'v 'L1 ''s ''ll a''d",
    # Digits: groups of three from the left, other scripts' digits, fractions, roman numerals, superscripts.
    "1 12 123 1234 12345 123456 1234567 3.14159 1,000,000 0x1F 1e-5 2026-11-22 192.168.0.1",
    "٠١٢٣٤٥٦٧٨٩ ०१२३४५६७८९ 〇一二三 ½⅓¾ ⅣⅫ x²y³ ①②③ 𝟘𝟙𝟚𝟛 a1b22c333d4444",
    # Whitespace runs.
    "  two   three    four     five\t\ttabs \t mixed\t end  ",
    "\n",
    "\n\n\n",
    "\r\n\r\nCRLF\r\nline\r\n  indented\r\n\r\n\r\n",
    "a\n b\n  c\n\n   d\n \n \n",
    " \n \n x",
    "   \n",
    "x   ",
    "x \n",
    "!\n\n?\r\n...\r\r\n--- \n",
    "no\u00a0break\u2003em\u2009thin\u3000ideographic\u2028line\u2029para\u0085nel\u1680ogham\u000bvt\u000cff\u202fnnbsp\u205fmm",
    "zero\u200bwidth\u200djoiner\u2060word\ufeffbom\u00adsoft\u180emvs",
    # Letters of many scripts.
    "Größe naïve café Ærøskøbing Łódź İstanbul ığüşöç ÀÉÎÕÜ ßẞ ŉ ﬁﬂ ﬆ",
    "Съешь же ещё этих мягких французских булок, да выпей чаю",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία. Ὦ ξεῖν’",
    "עִבְרִית שָׁלוֹם עולם אבג״ד",
    "العربية: السَّلَامُ عَلَيْكُمْ ـــ لا إله ﷽",
    "हिन्दी में लिखा हुआ पाठ क्षत्रिय नमस्ते",
    "ภาษาไทยไม่มีช่องว่างระหว่างคำ",
    "中文没有空格。日本語のテキスト、カタカナとひらがな。한국어 텍스트 입니다",
    "ქართული Հայերեն አማርኛ ខ្មែរ မြန်မာ සිංහල தமிழ் తెలుగు ಕನ್ನಡ മലയാളം ລາວ བོད་ཡིག",
    "𐍈𐌰𐌽 𐤀𐤁𐤂 𒀀𒁀 𓀀𓁐 𠜎𠜱 𝓗𝓮𝓵𝓵𝓸 ℵ₀ ℝ ℕ Å Ω",
    # Combining marks: precomposed, decomposed, stacked, alone.
    "é e\u0301 ö o\u0308 ñ n\u0303 q\u0307\u0323 Z\u0351\u036b\u0343\u036a\u0302 \u0301 \u0301\u0302 a\u20dd",
    # Emoji: plain, modifiers, ZWJ families, flags, keycaps, variation selectors, tags.
    "😀 😀😀 👍🏽 👨‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇫🇷 1️⃣#️⃣*️⃣ ❤️ ❤ ☺︎ 🏴󠁧󠁢󠁥󠁮󠁧󠁿 👩🏿‍🚀x😀y",
    # Punctuation and symbols.
    "!@#$%^&*()_+-=[]{}\\|;':\",./<>?`~ «quotes» “curly” ‘single’ … — – ‐ ¿¡ §¶†‡•",
    "+++ --- === *** ### //// \\\\\\\\ <<<>>> ((())) [[]] {{}} ,,,...;;; ??!!",
    "$100 €99.50 £1 ¥500 ₹10 5% 100° ±3 ≤≥≠≈ ∑∏∫√∞ αβγ ← → ⇒ ∀x∃y",
    "https://example.com/a/b?c=d&e=f#g user@example.org C:\\Users\\me /usr/local/bin ~/.config",
    "fn main() {\n    let x: Vec<u8> = vec![0; 16];\n\tprintln!(\"{:?}\", x);\n}\n",
    "def f(a,b):\n\treturn a**2+b // 3  # comment\n\n\nclass A: pass",
    "<div class=\"x\"><p>Hi&nbsp;there</p></div><!-- c -->",
    "{\"a\": [1, 2.5, null, true], \"b\": \"\\u00e9\\n\"}",
    "CamelCase snake_case kebab-case SCREAMING_CASE dot.case x1y2z3 iPhone15 H2O",
    # Control characters, private use, noncharacters, the last code point, unassigned.
    "\u0000 \u0001\u0002 \u001b[31mred\u001b[0m \u007f \u0080\u009f",
    "\ue000\uf8ff \ufdd0\ufffe\uffff \U000f0000 \U0010ffff \ufffd \u0378 \u0379",
    "\u202eright to left\u202c \u2066isolate\u2069 \u061c",
    # Special tokens as a user would type them, whole, cut, doubled and touching text.
    "<|begin_of_text|>",
    "Hello<|eot_id|>there <|end_of_text|> and <|eot_id|><|eot_id|>",
    "<|eot_id| <|eot_id> <eot_id|> <||> <|eot_id|>> <<|eot_id|> <| eot_id |> <|EOT_ID|>",
    " <|begin_of_text|> \n<|eot_id|>\n\n<|end_of_text|>s 's<|eot_id|>'s 12<|eot_id|>34",
    "<|start_header_id|>system<|end_header_id|>\n\nYou are<|eot_id|>",
    "Human: hi\n\nBITNETAssistant: Assistant: User: ",
    # A special token inside a word and next to emoji.
    "un<|eot_id|>believable 😀<|eot_id|>😀 é<|eot_id|>\u0301",
    # Runs.
    "a" * 300,
    "ab" * 200,
    " " * 257,
    "\n" * 65,
    "\t" * 33 + "x",
    "!" * 130,
    "0" * 101,
    "é" * 99,
    "😀" * 40,
    "中" * 77,
    "the" * 50,
    "The quick brown fox jumps over the lazy dog. " * 4,
    "aaa aaaa aaaaa abababab banana bananana mississippi",
    "          leading and trailing          ",
    "One\r\rTwo\r Three\n\rFour \r\n\t\r\nFive",
    "She said, \"I don't know.\" \"Why?\" asked Tom's mom. \"It's 3:30!\"\n\nThe end.\n",
]

# Generated cases: words of one alphabet of building blocks, drawn with a fixed seed.
BLOCKS = [
    " ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "a", "B", "the", "ing", " and", "é", "e\u0301", "я", "中", "ア",
    "한", "ا", "अ", "😀", "\u200d", "\ufe0f", "1", "22", "333", "٣", "½", "'", "'s", "'LL", "’", "ſ", ".", ",", "!", "?",
    "-", "_", "<", "|", ">", "<|eot_id|>", "<|end_of_text|>", "<|", "|>", "(", ")", "\"", "#", "$", "\u0301", "\u0000",
    "\ufffd", "\U0010ffff", "𝟘", "Ⅳ", "\u2028", "\u0085", "\u000b", "ß", "İ", "K",
]
N_RANDOM = 400

# Prompts of the logits. The long one is cut to 200 tokens.
STORY_PROMPTS = {
    "once": "Once upon a time",
    "dog": "The dog was sad because he",
    "park": "One day, a little girl named Lily went to the park with her mom. They saw a big",
    "dialogue": "\"Can I play with you?\" asked Tom.\n\"Yes,\" said",
    "odd": "12 + 30 = 😀 Größe\n\n\t<eot>",
}
STORY_LONG = (
    "Once upon a time, there was a little boy named Tim. Tim loved to play with his ball. He would run and jump and "
    "jump and jump. One day, Tim's mom made him a mess and he came to help Tim. Tim was scared and tried to reach the "
    "broken toy ball.\nTim's mom saw him and said, \"Don't worry, Tim. I will help you.\" Tim was so happy. He took "
    "the toy back to his mom. Tim and his mom played together with the toy ball. They had a great time.\n\nOne day, a "
    "little girl named Lily went to the park with her mom. They saw a big, white ball and wanted to play with it. Lily "
    "said, \"Let's play a game, it's fun!\"\nAs they played, Lily said, \"Let's play with the ball ball. Can we play "
    "with it?\" The ball was happy and said, \"Yes, I can play with you!\" So, they both played with the ball together. "
    "They were all very happy and played all day long.\n"
)


def texts():
    rng = random.Random(20261122)
    drawn = ["".join(rng.choice(BLOCKS) for _ in range(rng.randint(2, 24))) for _ in range(N_RANDOM)]
    return NASTY + drawn


def write_json(path, value):
    """Writes one line per entry of the outermost lists, so that a change is readable as a diff."""
    def dump(v):
        return json.dumps(v, ensure_ascii=True, separators=(",", ":"))

    lines = []
    for key, entry in value.items():
        if isinstance(entry, list):
            lines.append(f"{dump(key)}:[\n" + ",\n".join(dump(e) for e in entry) + "\n]")
        else:
            lines.append(f"{dump(key)}:{dump(entry)}")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(path, path.stat().st_size)
