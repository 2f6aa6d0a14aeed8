/** The words on calling the server name the one that shows them. */

const example = document.querySelector("pre code");
if (example) example.textContent = example.textContent.replace("http://127.0.0.1:8000/", new URL(".", location.href).href);
