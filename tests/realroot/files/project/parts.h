#define WORD "world"
const char *greeting(void);
const char *word(void);
int answer(void);
