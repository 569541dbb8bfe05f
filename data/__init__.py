"""Everything that turns text into token ids: tokenizers, record formats, data sets."""
