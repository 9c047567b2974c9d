// What serve_clients.py tries with each Node client; copied into the folder that holds node_modules.
//
//     node client_probes.mjs CLIENT URL MODEL
//
// Writes a line of JSON for each feature: its name and `passes`, or the error.

const [client, url, model] = process.argv.slice(2);
const SECONDS = 240; // of a check, at most
const QUESTION = "Name the capital of Japan.";
const messages = [{ role: "user", content: QUESTION }];
const SCHEMA = {
    type: "object",
    properties: { city: { type: "string", enum: ["Tokyo", "Kyoto"] } },
    required: ["city"],
    additionalProperties: false,
};
const SHORT = 40; // tokens of an answer whose text does not matter

const expect = (value, what) => {
    if (!value) throw new Error((JSON.stringify(what) ?? "nothing").slice(0, 200));
};
const capital = text => expect(text?.includes("Tokyo"), text);
const city = value => expect(["Tokyo", "Kyoto"].includes(value?.city), value);
const joined = async (parts, text) => {
    let whole = "";
    for await (const part of parts) whole += text(part) ?? "";
    return whole;
};

const openai = async () => {
    const { default: OpenAI } = await import("openai");
    const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
    const create = options => client.chat.completions.create({ model, messages, ...options });
    const tools = [{ type: "function", function: { name: "weather", parameters: SCHEMA } }];
    const tool_choice = { type: "function", function: { name: "weather" } };
    return {
        models: async () => expect((await client.models.list()).data.some(one => one.id === model), "not listed"),
        chat: async () => capital((await create({ temperature: 0 })).choices[0].message.content),
        stream: async () =>
            capital(await joined(await create({ temperature: 0, stream: true }), part => part.choices[0].delta.content)),
        completions: async () =>
            expect((await client.completions.create({ model, prompt: "Once", max_tokens: 3 })).choices),
        responses: async () =>
            capital((await client.responses.create({ model, input: QUESTION, temperature: 0 })).output_text),
        logprobs: async () =>
            expect((await create({ max_tokens: 8, logprobs: true, top_logprobs: 2 })).choices[0].logprobs.content),
        schema: async () => {
            const response_format = { type: "json_schema", json_schema: { name: "city", schema: SCHEMA } };
            city(JSON.parse((await create({ response_format })).choices[0].message.content));
        },
        tools: async () => {
            const options = { max_tokens: 100, tools };
            const { message } = (await create({ ...options, tool_choice, parallel_tool_calls: false })).choices[0];
            city(JSON.parse(message.tool_calls[0].function.arguments));
            const result = { role: "tool", tool_call_id: message.tool_calls[0].id, content: "sun" };
            const after = await create({ ...options, messages: [...messages, message, result], tool_choice: "none" });
            expect(after.choices[0].message.content, after);
        },
        "tools, stream": async () => {
            const runner = client.chat.completions.stream({ model, messages, tools, tool_choice, max_tokens: 100 });
            const { message } = (await runner.finalChatCompletion()).choices[0];
            city(JSON.parse(message.tool_calls[0].function.arguments));
        },
        embeddings: async () => expect((await client.embeddings.create({ model, input: "a" })).data[0].embedding.length),
        errors: async () => {
            const error = await create({ model: "nobody" }).catch(error => error);
            expect(error instanceof OpenAI.NotFoundError && error.code === "model_not_found", error);
        },
    };
};

const aiSdk = async () => {
    const { embed, generateObject, generateText, jsonSchema, stepCountIs, streamText, tool } = await import("ai");
    const { createOpenAICompatible } = await import("@ai-sdk/openai-compatible");
    const make = supportsStructuredOutputs =>
        createOpenAICompatible({ name: "llama2", baseURL: `${url}/v1`, apiKey: "none", supportsStructuredOutputs });
    const options = { model: make(true)(model), prompt: QUESTION, temperature: 0, maxOutputTokens: 100, maxRetries: 0 };
    const weather = tool({ description: "Weather.", inputSchema: jsonSchema(SCHEMA), execute: async () => "sun" });
    const forced = { tools: { weather }, toolChoice: { type: "tool", toolName: "weather" } };
    return {
        chat: async () => capital((await generateText(options)).text),
        stream: async () => capital(await joined(streamText(options).textStream, part => part)),
        schema: async () => {
            const schema = jsonSchema(SCHEMA);
            city((await generateObject({ ...options, schema })).object);
            // without the setting, the library names the schema in the prompt and requests any JSON object
            expect((await generateObject({ ...options, model: make(false)(model), schema: jsonSchema({ type: "object" }) })).object);
        },
        tools: async () => {
            const { steps } = await generateText({ ...options, ...forced, stopWhen: stepCountIs(2) });
            city(steps[0].toolCalls[0].input);
            expect(steps[0].toolResults[0].output === "sun" && steps.length === 2, steps[0].toolResults);
        },
        "tools, stream": async () => city((await streamText({ ...options, ...forced }).toolCalls)[0].input),
        embeddings: async () =>
            expect((await embed({ model: make(true).textEmbeddingModel(model), value: "a" })).embedding.length),
    };
};

const langchain = async () => {
    const { ChatOpenAI, OpenAIEmbeddings } = await import("@langchain/openai");
    const { HumanMessage, ToolMessage } = await import("@langchain/core/messages");
    const here = { model, apiKey: "none", maxRetries: 0, configuration: { baseURL: `${url}/v1` } };
    const chat = new ChatOpenAI({ ...here, temperature: 0, maxTokens: 100 });
    const tools = [{ type: "function", function: { name: "weather", description: "Weather.", parameters: SCHEMA } }];
    const bound = chat.bindTools(tools, { tool_choice: "weather" });
    return {
        chat: async () => capital((await chat.invoke(QUESTION)).content),
        stream: async () => capital(await joined(await chat.stream(QUESTION), part => part.content)),
        schema: async () =>
            city(await chat.withStructuredOutput({ title: "city", ...SCHEMA }, { method: "jsonSchema" }).invoke(QUESTION)),
        tools: async () => {
            const answer = await bound.invoke(QUESTION);
            city(answer.tool_calls[0].args);
            const result = new ToolMessage({ content: "sun", tool_call_id: answer.tool_calls[0].id });
            expect((await chat.invoke([new HumanMessage(QUESTION), answer, result])).content, "nothing");
        },
        "tools, stream": async () => {
            let whole;
            for await (const part of await bound.stream(QUESTION)) whole = whole ? whole.concat(part) : part;
            city(whole.tool_calls[0].args);
        },
        embeddings: async () => expect((await new OpenAIEmbeddings(here).embedQuery("a")).length),
    };
};

const agents = async () => {
    const { Agent, run, setDefaultOpenAIClient, setOpenAIAPI, setTracingDisabled, tool } = await import("@openai/agents");
    const { default: OpenAI } = await import("openai");
    setTracingDisabled(true);
    setDefaultOpenAIClient(new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 }));
    const calls = [];
    const weather = tool({
        name: "weather",
        description: "Weather.",
        parameters: SCHEMA,
        execute: async input => (calls.push(input), "sun"),
    });
    const agent = (modelSettings = {}, more = {}) =>
        new Agent({ name: "A", instructions: "Be brief.", model, modelSettings: { maxTokens: SHORT, ...modelSettings }, ...more });
    const called = async () => {
        calls.length = 0;
        const answer = await run(agent({ toolChoice: "weather", maxTokens: 100 }, { tools: [weather] }), QUESTION);
        city(calls[0]);
        expect(answer.finalOutput !== undefined, "no answer after the call");
    };
    return {
        chat: async () => {
            setOpenAIAPI("chat_completions");
            expect((await run(agent(), QUESTION)).finalOutput, "nothing");
        },
        stream: async () => {
            setOpenAIAPI("chat_completions");
            const answer = await run(agent(), QUESTION, { stream: true });
            expect(await joined(answer.toTextStream(), part => part), "nothing");
        },
        responses: async () => {
            setOpenAIAPI("responses");
            expect((await run(agent(), QUESTION)).finalOutput, "nothing");
        },
        tools: async () => {
            for (const api of ["chat_completions", "responses"]) {
                setOpenAIAPI(api);
                await called();
            }
        },
    };
};

const ollama = async () => {
    const { Ollama } = await import("ollama");
    const client = new Ollama({ host: url });
    const options = { temperature: 0 };
    return {
        models: async () => expect((await client.list()).models.some(one => one.name.split(":")[0] === model), "not listed"),
        chat: async () => capital((await client.chat({ model, messages, options })).message.content),
        stream: async () =>
            capital(await joined(await client.chat({ model, messages, options, stream: true }), part => part.message.content)),
        completions: async () =>
            expect((await client.generate({ model, prompt: "Once", options: { num_predict: 3 } })).response, "nothing"),
        schema: async () => city(JSON.parse((await client.chat({ model, messages, format: SCHEMA })).message.content)),
        tools: async () => {
            // it cannot demand a call: seeds are tried until there is one
            const tools = [{ type: "function", function: { name: "weather", description: "Weather.", parameters: SCHEMA } }];
            for (let seed = 0; seed < 30; seed++) {
                const options = { seed, temperature: 2, num_predict: 100 };
                const format = { type: "string", enum: ["never"] };
                const { message } = await client.chat({ model, messages, tools, format, options });
                if (message.tool_calls?.length) return city(message.tool_calls[0].function.arguments);
            }
            throw new Error("no call in 30 answers");
        },
        embeddings: async () => expect((await client.embed({ model, input: "a" })).embeddings[0].length),
        errors: async () => {
            const error = await client.chat({ model: "nobody", messages }).catch(error => error);
            expect(error.status_code === 404, error);
        },
    };
};

const CLIENTS = {
    "openai (Node)": openai,
    "Vercel AI SDK": aiSdk,
    "LangChain.js": langchain,
    "@openai/agents": agents,
    "ollama (Node)": ollama,
};

for (const [feature, check] of Object.entries(await CLIENTS[client]())) {
    const late = new Promise((_, reject) => setTimeout(reject, SECONDS * 1000, new Error(`took longer than ${SECONDS} s`)));
    const error = await Promise.race([check(), late]).then(() => null, error => error);
    const said = error && `FAILS: ${error.constructor.name}: ${error.message}`.replace(/\s+/g, " ").slice(0, 420);
    console.log(JSON.stringify([feature, said ?? "passes"]));
}
process.exit(0); // late timers
