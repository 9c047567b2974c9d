// Runs before anything is drawn, so that the page does not flash in the wrong colours. Nothing kept: as the system has it.
try {
  const theme = localStorage.getItem("llama2-theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // the browser keeps nothing
}
