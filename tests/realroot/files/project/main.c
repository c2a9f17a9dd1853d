#include <stdio.h>
#include "parts.h"

int main(void)
{
	printf("%s, %s: %d\n", greeting(), word(), answer());
	return 0;
}
