"""How an answer is scored: functions of its text and the row that was asked, each of which returns values by name."""
