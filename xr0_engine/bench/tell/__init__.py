"""What is made of results: report, tables, the regression gate, what to try next."""
