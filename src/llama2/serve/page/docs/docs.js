// The description of the API, generated from the server's openapi.json.

import { ApiError, description, key, models } from "../api.js";
import { h } from "../dom.js";
import { markdown } from "../markdown.js";

const root = new URL("..", import.meta.url);
const state = document.getElementById("state");
const fenced = (language, text) => `\`\`\`${language}\n${text}\n\`\`\``;

async function start() {
  try {
    const [api, served] = await Promise.all([description(), models()]);
    document.getElementById("examples").replaceChildren(examples(served[0].id));
    document.getElementById("routes").replaceChildren(...routes(api));
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    state.textContent = error.message;
    if (error.kind === "key") requestKey();
  }
}

function requestKey() {
  const input = h("input", { type: "password", name: "key", required: true, autocomplete: "off" });
  const submit = (event) => {
    event.preventDefault();
    key.set(input.value, false);
    form.remove();
    start();
  };
  const form = h("form", { submit }, h("label", {}, "Key", input), h("button", { class: "button primary" }, "Use this key"));
  document.getElementById("routes").append(form);
}

function examples(model) {
  const curl = `curl ${root}v1/chat/completions -H 'Content-Type: application/json' -d '{
  "model": "${model}",
  "messages": [{"role": "user", "content": "Why is the sky blue?"}]
}'`;
  const python = `from openai import OpenAI

client = OpenAI(base_url="${root}v1", api_key="-")
answer = client.chat.completions.create(
    model="${model}",
    messages=[{"role": "user", "content": "Why is the sky blue?"}],
)
print(answer.choices[0].message.content)`;
  return markdown(`${fenced("sh", curl)}\n\n${fenced("python", python)}`);
}

function routes({ paths, components }) {
  return Object.entries(paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, { summary, description, parameters, requestBody }]) => {
      const schema = resolve(requestBody?.content?.["application/json"]?.schema, components);
      const fields = [
        ...(parameters ?? []).map(({ name, schema, required }) => [name, schema, required]),
        ...Object.entries(schema?.properties ?? {}).map(([name, each]) => [name, each, schema.required?.includes(name)]),
      ];
      return h(
        "details",
        {},
        h(
          "summary",
          {},
          h("span", { class: "method" }, method.toUpperCase()),
          h("span", { class: "path" }, path),
          h("span", { class: "purpose" }, description?.split("\n", 1)[0] ?? summary ?? ""),
        ),
        h(
          "div",
          { class: "inner" },
          schema?.description ? markdown(schema.description) : null,
          fields.length ? table(fields, components) : h("p", {}, "It takes no fields."),
        ),
      );
    }),
  );
}

function table(fields, components) {
  const head = h("tr", {}, ...["Field", "Type", ""].map((text) => h("th", { scope: "col" }, text)));
  const rows = fields.map(([name, schema, required]) =>
    h(
      "tr",
      {},
      h("td", {}, h("code", {}, name)),
      h("td", {}, typeOf(schema, components)),
      h("td", {}, [required ? "required" : null, schema.description, limits(schema)].filter((part) => part).join("; ")),
    ),
  );
  head.lastChild.append(h("span", { class: "visually-hidden" }, "Remarks"));
  return h(
    "div",
    { class: "table-frame", tabindex: "0", role: "group", "aria-label": "Fields" },
    h("table", {}, h("thead", {}, head), h("tbody", {}, ...rows)),
  );
}

function resolve(schema, components) {
  return schema?.$ref ? components.schemas[schema.$ref.split("/").at(-1)] : schema;
}

function typeOf(schema, components, depth = 0) {
  if (depth > 4) return "…";
  if (schema.$ref) return schema.$ref.split("/").at(-1);
  const several = schema.anyOf ?? schema.oneOf;
  const inner = (each) => typeOf(each, components, depth + 1);
  if (several) return several.map(inner).filter((type) => type !== "null").join(" or ");
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" or ");
  if (schema.type === "array") return `list of ${schema.items ? inner(schema.items) : "anything"}`;
  return { integer: "whole number", string: "text", boolean: "true or false" }[schema.type] ?? schema.type ?? "anything";
}

function limits(schema) {
  const { minimum, maximum } = [schema, ...(schema.anyOf ?? [])].find((each) => each.minimum !== undefined) ?? {};
  if (minimum === undefined) return "";
  return maximum === undefined ? `at least ${minimum}` : `${minimum} to ${maximum}`;
}

start();
