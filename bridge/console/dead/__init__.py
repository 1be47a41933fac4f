"""Dead letters on the console: which there are, and what people do with them."""
