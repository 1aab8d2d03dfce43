"""From records to token ids: the words around questions, chat templates, and what is cut."""
