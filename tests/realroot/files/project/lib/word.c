#include "../parts.h"

const char *word(void)
{
	return WORD;
}
