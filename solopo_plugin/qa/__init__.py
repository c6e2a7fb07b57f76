"""Hold what making rows and judging models share: questions, documents, prompts, answers, generation, files, pages."""
