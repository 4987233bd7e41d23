"""The command line: parses, delegates, renders. All printing is here."""
