"""Recipes with a name of their own, as papers give to sums; `parse` reads a name as what stands here."""

NAMED = {
    # He et al. 2021, arXiv:2110.04366, section 4.6; lengths and widths as its authors set them for classification,
    # whose prefix has a network of width 800 in training
    "MAM": "Prefix(length=16) + Adapter(site='feed_forward', width=16, form='parallel', scale=2.0, activation='relu')",
    # Houlsby et al. 2019, arXiv:1902.00751, section 2.1
    "Houlsby": "Adapter(site=('attention', 'feed_forward'), width=64, activation='gelu_tanh') + LN()",
    # Pfeiffer et al. 2020, arXiv:2005.00247, section 3.2.1; a sixteenth of BERT-base's width; reads f, not LN(f + x)
    "Pfeiffer": "Adapter(site='feed_forward', width=48, activation='relu')",
    # Qi et al. 2022, arXiv:2211.08682, its unified framework: norms, prefix and attention adapters together
    "UnifiedLN": "LN() + Prefix(length=30) + Adapter(site='attention', width=64)",
}
