// llama.cpp's tokens of texts, and the tokens with which it continues, for bench/llamacpp.py, which compiles this.
//
//     cc -I SOURCES/include -I SOURCES/ggml/include llamacpp.c -L BUILD/bin -lllama -o llamacpp
//     ./llamacpp MODEL.gguf vocabulary|model < requests
//
// A request is a line, and its answer one line on standard output:
//
//     size                                the number of tokens of the vocabulary
//     defaults                            BOS, EOS, and whether BOS is put before a text
//     ids PARSE_SPECIAL LENGTH            token ids of the LENGTH bytes that follow, without BOS and EOS
//     greedy COUNT ID ID ...              token ids, COUNT of them, each the likeliest after those before it
//
// Continuing, keys and values are kept in float32, and attention is the plain one, so that nothing is rounded.
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "llama.h"

enum { CONTEXT = 512 };

static void fail(const char* reason) {
    fprintf(stderr, "%s\n", reason);
    exit(1);
}

static void errors_only(enum ggml_log_level level, const char* text, void* data) {
    (void)data;
    if (level == GGML_LOG_LEVEL_ERROR) fputs(text, stderr);
}

static void print(const llama_token* tokens, int count) {
    for (int i = 0; i < count; i++) printf(i ? " %d" : "%d", tokens[i]);
    putchar('\n');
    fflush(stdout);
}

static void tokenize(const struct llama_vocab* vocabulary, bool special, size_t length) {
    char* text = malloc(length + 1);
    llama_token* tokens = malloc((length + 8) * sizeof *tokens);
    if (!text || !tokens || fread(text, 1, length, stdin) != length) fail("a text is not whole");
    const int room = (int)length + 8;
    const int count = llama_tokenize(vocabulary, text, (int)length, tokens, room, false, special);
    if (count < 0) fail("more tokens than bytes");
    print(tokens, count);
    free(text);
    free(tokens);
}

static void proceed(struct llama_model* model, int wanted, char* words) {
    llama_token tokens[CONTEXT];
    int count = 0, known;
    for (char* word = strtok(words, " "); word && count < CONTEXT; word = strtok(NULL, " ")) {
        tokens[count++] = atoi(word);
    }
    if (!count || count + wanted > CONTEXT) fail("a prompt is too short or too long");
    known = count;

    struct llama_context_params options = llama_context_default_params();
    options.n_ctx = CONTEXT;
    options.n_threads = options.n_threads_batch = 1;
    options.type_k = options.type_v = GGML_TYPE_F32;
    options.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    struct llama_context* context = llama_init_from_model(model, options);
    if (!context) fail("no context");
    const int size = llama_vocab_n_tokens(llama_model_get_vocab(model));
    for (int begin = 0; count < known + wanted; begin = count - 1) {
        if (llama_decode(context, llama_batch_get_one(tokens + begin, count - begin))) fail("decoding failed");
        const float* logits = llama_get_logits_ith(context, -1);
        llama_token best = 0;
        for (llama_token token = 1; token < size; token++) {
            if (logits[token] > logits[best]) best = token;
        }
        tokens[count++] = best;
    }
    llama_free(context);
    print(tokens + known, wanted);
}

int main(int count, char** words) {
    if (count != 3 || (strcmp(words[2], "vocabulary") && strcmp(words[2], "model"))) {
        fprintf(stderr, "usage: %s MODEL.gguf vocabulary|model\n", words[0]);
        return 2;
    }
    llama_log_set(errors_only, NULL);
    llama_backend_init();
    struct llama_model_params options = llama_model_default_params();
    options.vocab_only = !strcmp(words[2], "vocabulary");
    struct llama_model* model = llama_model_load_from_file(words[1], options);
    if (!model) fail("llama.cpp does not load it");
    const struct llama_vocab* vocabulary = llama_model_get_vocab(model);

    char line[16384];
    while (fgets(line, sizeof line, stdin)) {
        int special, wanted, used = 0;
        size_t length;
        if (!strcmp(line, "size\n")) {
            printf("%d\n", llama_vocab_n_tokens(vocabulary));
            fflush(stdout);
        } else if (!strcmp(line, "defaults\n")) {
            const bool begins = llama_vocab_get_add_bos(vocabulary);
            printf("%d %d %d\n", llama_vocab_bos(vocabulary), llama_vocab_eos(vocabulary), begins);
            fflush(stdout);
        } else if (sscanf(line, "ids %d %zu", &special, &length) == 2) {
            tokenize(vocabulary, special != 0, length);
        } else if (sscanf(line, "greedy %d %n", &wanted, &used) == 1 && used) {
            proceed(model, wanted, line + used);
        } else {
            fail("an unknown request");
        }
    }
    llama_model_free(model);
    llama_backend_free();
    return 0;
}
