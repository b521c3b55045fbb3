"""How models write their thoughts and tool calls: what reads them, and the grammars that force them."""
