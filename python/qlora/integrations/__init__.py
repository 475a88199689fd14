"""At home in other libraries: transformers, PEFT, bitsandbytes. ``import qlora`` imports none of them."""
